"""What AttnRL logs, under `attnrl/`. Names follow the paper's figures; ratios are shares in [0, 1]."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from .rollouts import PromptRollouts
from .rows import TrainingRow


COUNTERS = ("samples", "generated_tokens", "missing_sampling_logps", "unscorable")


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
    expanded = [r for r in prompt.rollouts if r.branches]
    return [sample.reward >= threshold for r in expanded for sample in (r, *r.branches)]


def exploration_metrics(prompts: Sequence[PromptRollouts], threshold: float) -> dict[str, float]:
    """How initial rollouts, branch points and continuations came out (Fig. 6, 7a, 7c)."""
    initial = [_mean(p.correct(threshold)) for p in prompts]
    leaves = [[c.reward >= threshold for r in p.rollouts for c in r.branches] for p in prompts]
    branched = [(a, leaf) for a, leaf in zip(initial, leaves, strict=True) if leaf]
    solved = [leaf for a, leaf in branched if a == 1.0]
    points = [r.branch_points for p in prompts for r in p.rollouts if r.branch_points and r.branch_points.offsets]
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
        "reward_mc": _mean([c.reward for p in prompts for r in p.rollouts for c in r.branches]),
        "branch_offset": _mean(offsets),
        "fallback_branch_ratio": sum(p.num_fallbacks for p in points) / len(offsets) if offsets else float("nan"),
        "steps_per_rollout": _mean([len(r.step_ranges) for p in prompts for r in p.rollouts]),
        "influence/mean": _mean(influence),
        "influence/nonzero_ratio": _mean(influence > 0),
        "influence/p80": float(np.quantile(influence, 0.8)) if influence.size else float("nan"),
        "influence/max": float(influence.max()) if influence.size else float("nan"),
    }
    correct = [sum(p.correct(threshold)) for p in prompts]
    expanded = [sum(bool(r.branches) for r in p.rollouts) for p in prompts]
    num_rollouts = max((len(p.rollouts) for p in prompts), default=0)
    values |= {f"n_correct={k}": float(correct.count(k)) for k in range(num_rollouts + 1)}
    values |= {f"expanded={k}": float(expanded.count(k)) for k in range(num_rollouts + 1)}
    return values


def row_metrics(
    rows_of: Sequence[Sequence[TrainingRow]], trained: Sequence[int], num_drawn: int, capacity: int
) -> dict[str, float]:
    """What became of the drawn prompts: rows with signal, left out, missing (Fig. 7b, 7d, Table 3)."""
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
        "rows_padded": float(capacity - len(rows)),
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
    trainer,
    prompts: Sequence[PromptRollouts],
    rows_of: Sequence[Sequence[TrainingRow]],
    trained: Sequence[int],
    num_drawn: int,
) -> dict[str, float]:
    """Everything told of one training batch: the method's own values and those that TRL users look for."""
    args = trainer.args
    values = exploration_metrics(prompts, args.success_threshold)
    values |= row_metrics(rows_of, trained, num_drawn, args.generation_batch_size)
    values |= {
        "easy_influence_mean": trainer.easy_influence.mean,
        "policy_lag_initial": _mean([trainer.batches_trained - r.policy for p in prompts for r in p.rollouts]),
        "policy_lag_mc": _mean(
            [trainer.batches_trained - c.policy for p in prompts for r in p.rollouts for c in r.branches]
        ),
    }
    values |= {name: float(total) for name, total in trainer.counter_totals.items()}
    values = {f"attnrl/{name}": value for name, value in values.items()}
    lengths = [len(r.tokens) for p in prompts for r in p.rollouts]
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    rewards = [r.reward for p in prompts for r in p.rollouts]
    values |= {
        "num_tokens": float(trainer.counter_totals["generated_tokens"]),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths, default=0)),
        "completions/max_length": float(max(lengths, default=0)),
        "completions/clipped_ratio": _mean([r.tokens[-1] not in ends for p in prompts for r in p.rollouts]),
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else float("nan"),
    }
    return values


def sampling_metrics(trainer, batch: dict[str, Tensor]) -> dict[str, float]:
    """Difference between the sampler's and the trainer's log-probs, at the same policy for each token."""
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()  # (B, T)
    known = batch["completion_mask"].bool() & ~torch.isnan(difference)
    difference = difference.masked_fill(~known, 0.0)
    sums = torch.stack([difference.sum(), known.sum().to(difference.dtype)])
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    largest = trainer.accelerator.gather(difference.max().unsqueeze(0)).max().item()
    return {
        "sampling/sampling_logp_difference/mean": total / count if count else float("nan"),
        "sampling/sampling_logp_difference/max": largest,
    }


def ratio_metrics(trainer, batch: dict[str, Tensor], logps: Tensor) -> dict[str, float]:
    """Mean |ratio - 1| of the loss, apart for tokens of initial rollouts (one update older) and of continuations."""
    off = ((logps - batch["old_per_token_logps"]).exp() - 1).abs()  # (B, T)
    mask = batch["completion_mask"].bool()
    parts = {"initial": mask & ~batch["fresh_mask"], "mc": mask & batch["fresh_mask"]}
    sums = torch.stack([torch.stack([off[part].sum(), part.sum().to(off.dtype)]) for part in parts.values()])  # (2, 2)
    sums = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    return {
        f"attnrl/ratio_deviation_{name}": total / count if count else float("nan")
        for name, (total, count) in zip(parts, sums, strict=True)
    }


def flush_reward_logs(trainer) -> None:
    """Put what reward functions logged through `log_metric` and `log_extra` where TRL puts it.

    The parent class does this inside the method that AttnRL's pipeline replaces. Names are sorted so that all ranks
    gather in the same order.
    """
    for name in sorted(set(gather_object(list(trainer._pending_metrics)))):
        values = trainer._pending_metrics.get(name, [])
        sums = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=trainer.accelerator.device)
        total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        trainer._metrics["train"][name].append(total / count)
    trainer._pending_metrics.clear()


def log_completions(trainer, prompts: list, completions: list, rewards_per_func: Tensor) -> None:
    """Log the rewards of all that was just scored, and the completions themselves if `log_completions` is on."""
    for i, name in enumerate(trainer.reward_func_names):
        scores = rewards_per_func[:, i]
        scores = scores[~torch.isnan(scores)]
        if scores.numel():
            trainer._metrics["train"][f"rewards/{name}/mean"].append(scores.mean().item())
            trainer._metrics["train"][f"rewards/{name}/std"].append(scores.std(correction=0).item())
    flush_reward_logs(trainer)
    if trainer.log_completions:
        trainer._logs["prompt"].extend(gather_object(prompts))
        trainer._logs["completion"].extend(gather_object(completions))
        for i, name in enumerate(trainer.reward_func_names):
            trainer._logs["rewards"][name].extend(rewards_per_func[:, i].tolist())
        trainer._logs["advantages"].extend([float("nan")] * rewards_per_func.size(0))
        for column in sorted(set(gather_object(list(trainer._pending_extra_logs)))):
            values = trainer._pending_extra_logs.get(column, [None] * len(prompts))
            trainer._logs["extra"][column].extend(gather_object(values))
    trainer._pending_extra_logs.clear()
