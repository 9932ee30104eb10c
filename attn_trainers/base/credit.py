"""Credit as an object that any trainer takes: what a credit method is asked, and what it answers.

A credit method reads the model's attention over completions and answers with a factor per token, by which the host
multiplies the advantages. It knows nothing of where the completions come from: the GRPO host
(`attn_trainers.base.credit_trainer`) shows it groups, AttnRL's trainer the leaves of trees.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..attention import AttentionObserver
from .exhibits import Page
from .ranks import Ranks, Totals
from .report import Report


@dataclass(frozen=True)
class CompletionBatch:
    """Prompts and completions of one rank as they enter a forward.

    Attributes:
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: (B, P+T), 1 on real tokens; 0 on all of a completion that is masked out.
        completion_width: T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_width: int

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "CompletionBatch":
        """From the tensors `prompt_ids`, `prompt_mask` (B, P), `completion_ids` and `completion_mask` (B, T)."""
        return cls(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),  # (B, P+T)
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),  # (B, P+T)
            batch["completion_ids"].size(1),
        )

    @property
    def prompt_lengths(self) -> list[int]:
        return self.attention_mask[:, : -self.completion_width].sum(dim=1).tolist()

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Real prompt tokens of each row."""
        width = self.input_ids.size(1) - self.completion_width
        ids = self.input_ids[:, :width].tolist()
        return [row[width - length :] for row, length in zip(ids, self.prompt_lengths, strict=True)]

    @property
    def completion_ids(self) -> list[list[int]]:
        """Real completion tokens of each row."""
        ids = self.input_ids[:, -self.completion_width :].tolist()
        lengths = self.attention_mask[:, -self.completion_width :].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]


@dataclass
class SignalPass:
    """One batch and what a forward over it showed.

    Attributes:
        batch: the rows.
        observer: the credit method's own, having seen all rows; `None` where it wanted none.
        entropies: (B, T) entropy of the distribution each completion token was drawn from, where it was asked for.
        seconds: time the observer took (on a GPU: to enqueue its work).
    """

    batch: CompletionBatch
    observer: AttentionObserver | None = None
    entropies: Tensor | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class RowFacts:
    """What is known of the rows of a batch, in their order.

    Attributes:
        keys: name of each row, the same on any number of ranks, for what is drawn at random.
        correct: (B,) 1 or 0; NaN where it could not be said.
        accuracies: (B,) share of correct completions of the row's prompt, 0 where none could be judged.
    """

    keys: list[str]
    correct: Tensor
    accuracies: Tensor


@dataclass(frozen=True)
class CreditContext:
    """Where the run stands, and what a credit method may ask of its host.

    Attributes:
        ranks: the ranks of the run.
        step, max_steps: optimizer steps done and planned.
        observe: shows a batch's attention to an observer in a forward of its own; every rank calls it alike.
        folder: output folder of the run.
        rewards: (N,) weighted reward of all rows of all ranks, NaN where none could be given; `None` on trees.
        group_size: rows of a prompt, which follow each other; `None` on trees.
    """

    ranks: Ranks
    step: int
    max_steps: int
    observe: Callable[[CompletionBatch, AttentionObserver], None]
    folder: Path
    rewards: Tensor | None = None
    group_size: int | None = None


@dataclass
class BatchCredit:
    """What a credit method answers for one generation batch.

    Attributes:
        factors: per pass (B, T), by which advantages are multiplied; `None`: all are 1.
        advantages: per pass (B,) or (B, T) in place of the host's own; `None` keeps those.
        totals: sums and counts over this rank's rows, logged as means over all ranks.
        values: logged as they are; the same on every rank.
        columns: values of this rank's rows by name, `None` where there is none, for the table of logged completions.
        details: what the method made of each row, for its reports.
    """

    factors: list[Tensor] | None = None
    advantages: list[Tensor] | None = None
    totals: Totals = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    details: Any = None


class CreditMethod(ABC):
    """
    How advantages are weighed per token. A method defines `observer` and `factors`, and of the rest what it needs.

    All methods are called on every rank in every generation batch, in the order in which they stand here.

    Attributes:
        prefix: under which its metrics appear.
        needs_entropies: whether `SignalPass.entropies` is wanted.
        success_threshold: least weighted reward of a correct completion.
        line_fields: metrics of its own in the line at each log, as `attn_trainers.base.log_line` takes them.
    """

    prefix: str
    line_fields: Mapping[str, str] = MappingProxyType({})
    needs_entropies: bool = False
    success_threshold: float = 0.5

    def settings(self) -> dict[str, object]:
        """Its settings that are not the defaults, by name, for the model's card."""
        return {}

    def preflight(self, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
        """What it says of a run, and refuses, before the model is loaded; as `MethodConfig.preflight`."""

    def check_trees(self) -> None:
        """Refuse settings that need whole groups of independent completions.

        Raises:
            ValueError: naming field, value and fix.
        """

    def setup(self, model, tokenizer, reward_names: Sequence[str], seed: int) -> None:
        """Learn of the run, once, before it starts.

        Args:
            model: the model that is trained.
            tokenizer: its tokenizer.
            reward_names: names of the F reward functions.
            seed: of the run.

        Raises:
            ValueError: for what does not fit the model.
        """

    def judge(self, rewards_per_func: Tensor, weights: Tensor) -> Tensor:
        """Which completions are correct: (N,) 1 or 0, NaN where it cannot be said.

        Args:
            rewards_per_func: (N, F), NaN where a function gave none.
            weights: (F,).
        """
        total = weighted_rewards(rewards_per_func, weights)
        return (total >= self.success_threshold).float().masked_fill(total.isnan(), torch.nan)

    def shape_rewards(self, rewards_per_func: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
        """(N, F) rewards that advantages are made of.

        Args:
            rewards_per_func: (N, F), NaN where a function gave none.
            lengths: (N,) completion tokens.
            groups: (N,) index of the prompt.
        """
        return rewards_per_func

    def reward_metrics(self, correct: Tensor, lengths: Tensor, groups: Tensor) -> dict[str, float]:
        """What it logs of all completions of all ranks; `correct` as `judge` gives it."""
        return {}

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor | None:
        """(N,) advantages in place of the host's own, or `None` to keep those. Trees keep theirs.

        Args:
            rewards: (N,) weighted sum of the shaped rewards; NaN for a completion no function scored.
            groups: (N,) index of the prompt.
        """
        return None

    @abstractmethod
    def observer(self, batch: CompletionBatch) -> AttentionObserver | None:
        """An observer of a batch, or `None` where no signal is needed (the same on every rank)."""

    @abstractmethod
    def factors(
        self,
        passes: Sequence[SignalPass],
        advantages: Sequence[Tensor],
        facts: Sequence[RowFacts],
        context: CreditContext,
    ) -> BatchCredit:
        """Factors of a generation batch.

        Args:
            passes: the batches as they were observed.
            advantages: per pass (B, 1), or (B, T) where they differ between tokens; the sign may change in a row.
            facts: per pass, of its rows.
            context: of the run.
        """

    def report(self, credit: BatchCredit, context: CreditContext) -> None:
        """Write what it shows of a generation batch, once it is logged."""

    def page(self, credit: BatchCredit, title: str) -> Page | None:
        """A page of one of this rank's completions, on the first rank; `None` for one that shades tokens by factor."""
        return None

    def state_dict(self) -> dict:
        """What outlives a batch, as JSON types."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take up a state that `state_dict` gave."""


def pad_rows(rows: Sequence[Tensor], width: int, value: float) -> Tensor:
    """(B, width) float32 from rows of (n_i,)."""
    padded = torch.full((len(rows), width), value, dtype=torch.float32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def mean_factors(batch: CompletionBatch, factors: Tensor) -> list[float]:
    """Mean factor over the tokens of each row, 1 for a row without tokens.

    Args:
        batch: B rows.
        factors: (B, T).
    """
    lengths = map(len, batch.completion_ids)
    return [row[:length].mean().item() if length else 1.0 for row, length in zip(factors, lengths, strict=True)]


def weighted_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """(N,) weighted sum of (N, F) rewards, those left out that a function did not give; NaN where none gave any."""
    total = (rewards_per_func * weights.to(rewards_per_func.device)).nansum(dim=1)  # (N,)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def group_accuracies(correct: Tensor, groups: Tensor) -> Tensor:
    """(N,) share of correct completions of each row's prompt among those that could be judged; 0 where none could.

    Args:
        correct: (N,) 1 or 0, NaN where it could not be said.
        groups: (N,) index of the prompt.
    """
    _, index = groups.unique(return_inverse=True)  # (N,)
    known = ~correct.isnan()
    sums = correct.new_zeros(int(index.max()) + 1 if len(index) else 0)
    right = sums.index_add(0, index, correct.nan_to_num(nan=0.0))
    count = sums.index_add(0, index, known.to(correct.dtype))
    return (right / count.clamp(min=1.0))[index]
