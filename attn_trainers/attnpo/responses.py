"""A response on its way through AttnPO: its steps, their scores and what became of their credit."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .alignment import StepAlignment


@dataclass
class ScoredResponse:
    """One response, its steps and what became of their credit.

    Attributes:
        prompt_ids: tokens of the prompt.
        completion_ids: sampled tokens; empty for a response that is masked out.
        alignment: its steps on these tokens.
        scores: (num_steps,) attention of the final answer to each step, `None` where none was read.
        correct: whether it is correct.
        accuracy: p, share of correct responses to the prompt.
        advantages: A of each token before scaling, all the same outside of trees; one value where there is no token.
        baseline: S_base, `None` without scores.
        positive_scales, negative_scales: (num_steps,) factor γ of each step on a positive and on a negative advantage;
            `None` for a response that is not to be scaled.
        phrases: how often each kind of phrase occurs in its thinking; empty where steps are paragraphs.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    alignment: StepAlignment
    scores: Tensor | None = None
    correct: bool = False
    accuracy: float = 0.0
    advantages: list[float] = field(default_factory=list)
    baseline: float | None = None
    positive_scales: Tensor | None = None
    negative_scales: Tensor | None = None
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
    def advantage(self) -> float:
        """A of the last token: of the whole response, or in a tree of what is the leaf's alone; 0 without tokens."""
        return self.advantages[-1] if self.advantages else 0.0

    @property
    def attenuated(self) -> Tensor:
        """(num_steps,) bool, steps in which a positive advantage lost credit (PA)."""
        return self._scaled(self.positive_scales, 1.0)

    @property
    def protected(self) -> Tensor:
        """(num_steps,) bool, steps that were spared a negative advantage (NA)."""
        return self._scaled(self.negative_scales, -1.0)

    @property
    def scales(self) -> Tensor | None:
        """(num_steps,) factor γ of each step on the advantages that it has; `None` where nothing is to be scaled.

        Of a step with advantages of both signs, the factor on the positive ones if that is not 1.
        """
        if self.positive_scales is None:
            return None
        spared = torch.where(self.protected, self.negative_scales, torch.ones_like(self.negative_scales))
        return torch.where(self.attenuated, self.positive_scales, spared)

    def _scaled(self, scales: Tensor | None, sign: float) -> Tensor:
        ranges = self.alignment.step_ranges
        if scales is None:
            return torch.zeros(len(ranges), dtype=torch.bool)
        has_sign = [any(sign * value > 0 for value in self.advantages[start:end]) for start, end in ranges]
        return (scales != 1.0) & torch.tensor(has_sign, dtype=torch.bool)
