"""From the trees of a prompt to training rows, and from rows to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base.credit import RowFacts
from .rollouts import PromptRollouts, branches_of
from .trees import has_signal, tree_paths


@dataclass(frozen=True)
class TrainingRow:
    """One leaf of a tree: a whole completion with an advantage per token.

    Attributes:
        prompt_ids: tokens of the prompt.
        completion_ids: tokens of the completion, (n,) int32.
        advantages: (n,) float32.
        old_logps: (n,) float32; entries from `fresh_from` on are not known yet and hold 0.
        sampling_logps: (n,) float32, NaN where the sampler gave none.
        fresh_from: first token whose old log-prob comes from a forward just before the update: the length of the
            initial rollout's part.
        key: name of the leaf, by draw, tree and leaf.
        correct: 1.0 or 0.0; NaN where it could not be said, or nobody asked.
        accuracy: share of correct leaves of the prompt.
    """

    prompt_ids: list[int]
    completion_ids: np.ndarray
    advantages: np.ndarray
    old_logps: np.ndarray
    sampling_logps: np.ndarray
    fresh_from: int
    key: str = ""
    correct: float = float("nan")
    accuracy: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def tree(self) -> str:
        """Name of its tree, whose rows share prefixes."""
        return self.key.rpartition("/")[0]

    @classmethod
    def unscored(cls, prompt_ids: list[int], completion_ids: np.ndarray) -> "TrainingRow":
        """A row of which nothing but the tokens is known."""
        nothing = np.zeros(len(completion_ids), dtype=np.float32)
        return cls(prompt_ids, completion_ids, nothing, nothing, nothing, fresh_from=0)


def _sampling_logps(logps: np.ndarray | None, length: int) -> np.ndarray:
    return np.full(length, np.nan, dtype=np.float32) if logps is None else logps[:length]


@dataclass(frozen=True)
class LeafValues:
    """What a prompt's leaves are worth, each in the order of `PromptRollouts.leaves`.

    Attributes:
        rewards: the reward that values and advantages are made of.
        correct: 1.0 or 0.0; NaN where it could not be said.
        accuracy: share of correct leaves.
    """

    rewards: list[float]
    correct: list[float]
    accuracy: float

    @classmethod
    def plain(cls, prompt: PromptRollouts) -> "LeafValues":
        """Rewards as they were given; nothing said about correctness."""
        rewards = [sample.reward for sample in prompt.leaves]
        return cls(rewards, [float("nan")] * len(rewards), 0.0)


def training_rows(
    prompt: PromptRollouts, train_unexpanded: bool, values: LeafValues | None = None
) -> list[TrainingRow]:
    """Rows of one prompt: one per leaf of its expanded trees, and one per unexpanded rollout if wanted."""
    values = values or LeafValues.plain(prompt)
    rows = []
    for path, correct in zip(tree_paths(prompt.trees(values.rewards)), values.correct, strict=True):
        rollout = prompt.rollouts[path.tree]
        branches = branches_of(rollout)
        if not branches and not train_unexpanded:
            continue
        num_tokens = len(path.tokens)
        if path.leaf == 0:
            fresh_from, tokens = num_tokens, rollout.tokens
            sampling = _sampling_logps(rollout.sampling_logps, num_tokens)
        else:
            branch = branches[path.leaf - 1]
            fresh_from = branch.offset
            tokens = np.concatenate([rollout.tokens[:fresh_from], branch.tokens])
            head = _sampling_logps(rollout.sampling_logps, fresh_from)
            sampling = np.concatenate([head, _sampling_logps(branch.sampling_logps, len(branch.tokens))])
        old_logps = np.zeros(num_tokens, dtype=np.float32)
        old_logps[:fresh_from] = rollout.old_logps[:fresh_from]
        advantages = np.asarray(path.advantages, dtype=np.float32)
        key = f"{prompt.draw.serial}/{path.tree}/{path.leaf}"
        logps = (old_logps, sampling, fresh_from)
        rows.append(TrainingRow(prompt.prompt_ids, tokens, advantages, *logps, key, correct, values.accuracy))
    return rows


def prompt_rows(prompt: PromptRollouts, train_unexpanded: bool, values: LeafValues | None = None) -> list[TrainingRow]:
    """Rows of a prompt that carry signal: none if it was filtered, or if its leaves all got the same reward (4.3)."""
    values = values or LeafValues.plain(prompt)
    if prompt.filtered or not has_signal(prompt.trees(values.rewards), include_unexpanded=train_unexpanded):
        return []
    return training_rows(prompt, train_unexpanded, values)


def row_facts(rows: Sequence[TrainingRow | None]) -> RowFacts:
    """What a credit method is told of the rows of a micro-batch."""
    known = [(row.key, row.correct, row.accuracy) if row is not None else ("", float("nan"), 0.0) for row in rows]
    keys, correct, accuracies = zip(*known, strict=True)
    return RowFacts(list(keys), torch.tensor(correct), torch.tensor(accuracies))


def fit_capacity(row_counts: Sequence[int], capacity: int) -> list[int]:
    """Indices of the prompts that are trained on: whole prompts in their order, each that still fits."""
    kept, used = [], 0
    for index, count in enumerate(row_counts):
        if used + count <= capacity:
            kept.append(index)
            used += count
    return kept


def collate(rows: Sequence[TrainingRow | None], pad_token_id: int) -> dict[str, Tensor]:
    """Tensors of one micro-batch on one rank, prompts padded on the left and completions on the right.

    A row that is `None` becomes one prompt token and one masked completion token: the forward and backward run over
    it, the loss and its normaliser do not see it.

    Returns:
        `prompt_ids`, `prompt_mask` (B, P); `completion_ids`, `completion_mask`, `advantages`, `old_per_token_logps`,
        `sampling_per_token_logps`, `fresh_mask` (B, T), the last one marking the tokens whose old log-prob is missing.
    """
    prompt_width = max([len(row.prompt_ids) for row in rows if row is not None], default=1)
    width = max([len(row.completion_ids) for row in rows if row is not None], default=1)
    num_rows = len(rows)
    batch = {
        "prompt_ids": torch.full((num_rows, prompt_width), pad_token_id),  # (B, P)
        "prompt_mask": torch.zeros((num_rows, prompt_width), dtype=torch.long),  # (B, P)
        "completion_ids": torch.full((num_rows, width), pad_token_id),  # (B, T)
        "completion_mask": torch.zeros((num_rows, width), dtype=torch.long),  # (B, T)
        "advantages": torch.zeros((num_rows, width)),  # (B, T)
        "old_per_token_logps": torch.zeros((num_rows, width)),  # (B, T)
        "sampling_per_token_logps": torch.zeros((num_rows, width)),  # (B, T)
        "fresh_mask": torch.zeros((num_rows, width), dtype=torch.bool),  # (B, T)
    }
    for i, row in enumerate(rows):
        if row is None:
            batch["prompt_mask"][i, -1] = 1
            continue
        prompt_length, length = len(row.prompt_ids), len(row.completion_ids)
        batch["prompt_ids"][i, prompt_width - prompt_length :] = torch.tensor(row.prompt_ids)
        batch["prompt_mask"][i, prompt_width - prompt_length :] = 1
        batch["completion_ids"][i, :length] = torch.from_numpy(row.completion_ids)
        batch["completion_mask"][i, :length] = 1
        batch["advantages"][i, :length] = torch.from_numpy(row.advantages)
        batch["old_per_token_logps"][i, :length] = torch.from_numpy(row.old_logps)
        batch["sampling_per_token_logps"][i, :length] = torch.from_numpy(row.sampling_logps)
        batch["fresh_mask"][i, row.fresh_from : length] = True
    return batch


def pad_rows(batch: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Fill a batch up with rows of zeros, whose mask is empty: ranks that exchange a value per row have as many."""
    padded = {}
    for name, tensor in batch.items():
        if tensor.dim() > 0 and tensor.size(0) < num_rows:
            missing = tensor.new_zeros((num_rows - tensor.size(0), *tensor.shape[1:]))
            tensor = torch.cat([tensor, missing])
        padded[name] = tensor
    return padded


def importance_sampling_ratio(
    old_logps: Tensor, sampling_logps: Tensor, mask: Tensor, mode: str, clip_min: float | None, clip_max: float | None
) -> Tensor:
    """Correction of the sampler-to-trainer mismatch, as TRL's `vllm_importance_sampling_mode` defines it.

    Args:
        old_logps, sampling_logps: (B, T), both of the policy that sampled the token; a NaN sampling log-prob counts as
            no mismatch.
        mask: (B, T), 1 on real tokens.
        mode: `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`.
        clip_min, clip_max: bounds, `None` for none.

    Returns:
        (B, T) for token modes, (B, 1) for sequence modes.
    """
    level, constraint = mode.split("_")
    difference = torch.nan_to_num((old_logps - sampling_logps) * mask, nan=0.0)  # (B, T)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)  # (B, 1)
    ratio = difference.exp()
    if constraint == "truncate":
        return ratio.clamp(min=clip_min, max=clip_max) if (clip_min, clip_max) != (None, None) else ratio
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        outside |= ratio < clip_min
    if clip_max is not None:
        outside |= ratio > clip_max
    return ratio.masked_fill(outside, 0.0)
