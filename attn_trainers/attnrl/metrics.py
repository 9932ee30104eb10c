"""What AttnRL logs, under `attnrl/`. Names follow the paper's figures; ratios are shares in [0, 1]."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from ..base.ranks import Totals
from .batches import Update, rank_loads
from .pipeline import Pipeline
from .rollouts import BranchedRollout, PromptRollouts, branches_of
from .rows import TrainingRow


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _solve_ratios(accuracies: Sequence[float], suffix: str) -> dict[str, float]:
    """Shares of prompts whose samples are all right, all wrong, and in between (Fig. 6)."""
    return {
        f"solve_all_ratio{suffix}": _mean([a == 1.0 for a in accuracies]),
        f"solve_none_ratio{suffix}": _mean([a == 0.0 for a in accuracies]),
        f"valid_ratio{suffix}": _mean([0.0 < a < 1.0 for a in accuracies]),
    }


def _trained_leaves(prompt: PromptRollouts, threshold: float) -> list[bool]:
    """Which leaves of the expanded rollouts are correct, initial ones included."""
    expanded = [r for r in prompt.rollouts if branches_of(r)]
    return [sample.reward >= threshold for r in expanded for sample in (r, *r.branches)]


def exploration_metrics(prompts: Sequence[PromptRollouts], threshold: float) -> dict[str, float]:
    """How initial rollouts, branch points and continuations came out (Fig. 6, 7a, 7c)."""
    initial = [_mean(p.correct(threshold)) for p in prompts]
    leaves = [[c.reward >= threshold for c in p.continuations] for p in prompts]
    branched = [(a, leaf) for a, leaf in zip(initial, leaves, strict=True) if leaf]
    solved = [leaf for a, leaf in branched if a == 1.0]
    points = [r.branch_points for p in prompts for r in p.rollouts if isinstance(r, BranchedRollout)]
    offsets = [offset for point in points for offset in point.offsets]
    influence = [r.influence for p in prompts for r in p.rollouts if r.influence is not None and r.influence.size]
    influence = np.concatenate(influence) if influence else np.zeros(0)
    values = _solve_ratios(initial, "")
    values |= _solve_ratios([_mean(leaf) for _, leaf in branched], "_mc")
    values |= _solve_ratios([_mean(leaf) for p in prompts if (leaf := _trained_leaves(p, threshold))], "_all")
    values |= {
        "correct_once_twice_invalid_ratio": _mean([all(leaf) for leaf in solved]),
        "correct_filtered_ratio": _mean([p.filtered for p, a in zip(prompts, initial, strict=True) if a == 1.0]),
        "total_filtered_ratio": _mean([p.filtered for p in prompts]),
        "reward_initial": _mean([r.reward for p in prompts for r in p.rollouts]),
        "reward_mc": _mean([c.reward for p in prompts for c in p.continuations]),
        "branch_offset": _mean(offsets),
        "fallback_branch_ratio": sum(p.num_fallbacks for p in points) / len(offsets) if offsets else float("nan"),
        "steps_per_rollout": _mean([len(r.step_ranges) for p in prompts for r in p.rollouts]),
        "influence/mean": _mean(influence),
        "influence/nonzero_ratio": _mean(influence > 0),
        "influence/p80": float(np.quantile(influence, 0.8)) if influence.size else float("nan"),
        "influence/max": float(influence.max()) if influence.size else float("nan"),
    }
    correct = [sum(p.correct(threshold)) for p in prompts]
    expanded = [sum(bool(branches_of(r)) for r in p.rollouts) for p in prompts]
    num_rollouts = max((len(p.rollouts) for p in prompts), default=0)
    values |= {f"n_correct={k}": float(correct.count(k)) for k in range(num_rollouts + 1)}
    values |= {f"expanded={k}": float(expanded.count(k)) for k in range(num_rollouts + 1)}
    return values


def row_metrics(rows_of: Sequence[Sequence[TrainingRow]], trained: Sequence[int], num_drawn: int) -> dict[str, float]:
    """What became of the drawn prompts: rows with signal, trained on, left out (Fig. 7b, 7d, Table 3)."""
    rows = [row for index in trained for row in rows_of[index]]
    num_rows = sum(map(len, rows_of))
    num_tokens = sum(len(row.completion_ids) for row in rows)
    with_signal = [row for row in rows if np.any(row.advantages != 0)]
    return {
        "real_train_bs": float(num_drawn),
        "filtered_ratio_all": _mean([not rows for rows in rows_of]),
        "rows_with_signal": float(num_rows),
        "rows_trained": float(len(rows)),
        "rows_over_capacity": float(num_rows - len(rows)),
        "prompts_trained": float(sum(bool(rows_of[index]) for index in trained)),
        "valid_train_token_num": float(sum(len(row.completion_ids) for row in with_signal)),
        "valid_train_token_ratio": (
            sum(len(row.completion_ids) for row in with_signal) / num_tokens if num_tokens else float("nan")
        ),
        "nonzero_advantage_token_ratio": (
            sum(int(np.count_nonzero(row.advantages)) for row in rows) / num_tokens if num_tokens else float("nan")
        ),
        "fresh_token_ratio": (
            sum(len(row.completion_ids) - row.fresh_from for row in rows) / num_tokens if num_tokens else float("nan")
        ),
    }


def batch_metrics(
    prompts: Sequence[PromptRollouts],
    rows_of: Sequence[Sequence[TrainingRow]],
    trained: Sequence[int],
    num_drawn: int,
    threshold: float,
) -> dict[str, float]:
    """What is told of one training batch under `attnrl/`, but for the state of the pipeline.

    Args:
        prompts: all prompts of the batch, in the order of their draws.
        rows_of: rows of each prompt.
        trained: indices of the prompts whose rows are trained on.
        num_drawn: prompts that were drawn for the batch.
        threshold: least reward of a correct completion.
    """
    return exploration_metrics(prompts, threshold) | row_metrics(rows_of, trained, num_drawn)


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """What a batch costs: its updates and micro-batches, the tokens that are forwarded, and how evenly ranks carry
    them: the slowest rank of each update over the mean, weighed by tokens."""
    loads = [rank_loads(update) for update in updates]
    total = sum(map(sum, loads))
    slowest = sum(max(of_update) * len(of_update) for of_update in loads)
    return {
        "updates": float(len(updates)),
        "micro_batches": float(sum(map(len, updates))),
        "unique_tokens": float(total),
        "load_imbalance": slowest / total if total else float("nan"),
    }


def pipeline_metrics(pipeline: Pipeline, prompts: Sequence[PromptRollouts]) -> dict[str, float]:
    """State of the pipeline: counts, the filter's mean, and how many updates old the samples' policies are."""
    now = pipeline.batches_trained
    return {
        "empty_batches": float(pipeline.empty_batches),
        "easy_influence_mean": pipeline.easy_influence.mean,
        "policy_lag_initial": _mean([now - r.policy for p in prompts for r in p.rollouts]),
        "policy_lag_mc": _mean([now - c.policy for p in prompts for c in p.continuations]),
    } | {name: float(total) for name, total in pipeline.totals.items()}


def completion_metrics(prompts: Sequence[PromptRollouts], ends: Collection[int]) -> dict[str, float]:
    """Lengths and rewards of initial rollouts, under the names that TRL's users look for.

    Args:
        prompts: all prompts of the batch.
        ends: tokens that end a completion.
    """
    rollouts = [r for p in prompts for r in p.rollouts]
    lengths = [len(r.tokens) for r in rollouts]
    rewards = [r.reward for r in rollouts]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths, default=0)),
        "completions/max_length": float(max(lengths, default=0)),
        "completions/mean_thinking_length": _mean([r.thinking_length for r in rollouts]),
        "completions/clipped_ratio": _mean([int(r.tokens[-1]) not in ends for r in rollouts]),
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else float("nan"),
    }


def sampling_totals(batch: dict[str, Tensor]) -> Totals:
    """Difference between the sampler's and the trainer's log-probs, at the same policy for each token."""
    difference = sampling_difference(batch)
    return {"sampling/sampling_logp_difference/mean": _total(difference, ~difference.isnan())}


def sampling_difference(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) absolute difference of the sampler's and the trainer's log-probs; NaN where there is none."""
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
    return difference.masked_fill(~batch["completion_mask"].bool(), torch.nan)


def ratio_totals(batch: dict[str, Tensor], logps: Tensor) -> Totals:
    """|ratio - 1| of the loss, apart for tokens of initial rollouts (one update older) and of continuations."""
    off = ((logps - batch["old_per_token_logps"]).exp() - 1).abs()  # (B, T)
    mask = batch["completion_mask"].bool()
    parts = {"initial": mask & ~batch["fresh_mask"], "mc": mask & batch["fresh_mask"]}
    return {f"ratio_deviation_{name}": _total(off, part) for name, part in parts.items()}


def _total(values: Tensor, counted: Tensor) -> tuple[float, float]:
    return values[counted].sum().item(), float(counted.sum())
