"""A response on its way through AttnPO: its steps, their scores and what became of their credit."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .alignment import StepAlignment


@dataclass
class ScoredResponse:
    """One response, its steps and what became of their credit.

    Attributes:
        prompt_ids: Tokens of the prompt.
        completion_ids: Sampled tokens; empty for a response that is masked out.
        alignment: Its steps on these tokens.
        scores: (num_steps,) attention of the final answer to each step, None where none was read.
        correct: Whether it is correct.
        accuracy: p, share of correct responses to the prompt.
        advantage: A, before scaling.
        baseline: S_base, None without scores.
        scales: (num_steps,) factor γ of each step; None for a response that is not to be scaled.
        phrases: How often each kind of phrase occurs in its thinking; empty where steps are paragraphs.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    alignment: StepAlignment
    scores: Tensor | None = None
    correct: bool = False
    accuracy: float = 0.0
    advantage: float = 0.0
    baseline: float | None = None
    scales: Tensor | None = None
    phrases: dict[str, int] = field(default_factory=dict)

    @property
    def answer_length(self) -> int:
        """|F|, tokens after the end of thinking; 0 without one."""
        start = self.alignment.answer_start
        return 0 if start is None else len(self.completion_ids) - start

    @property
    def sequence_length(self) -> int:
        """L, tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def step_lengths(self) -> Tensor:
        """(num_steps,) tokens of each step."""
        return torch.tensor([end - start for start, end in self.alignment.step_ranges], dtype=torch.long)

    @property
    def scaled(self) -> Tensor:
        """(num_steps,) bool, steps whose factor is not 1."""
        if self.scales is None:
            return torch.zeros(len(self.alignment.step_ranges), dtype=torch.bool)
        return self.scales != 1.0
