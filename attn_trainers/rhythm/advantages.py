"""Advantages from the task reward and the rhythm reward of whole groups."""

import torch
from torch import Tensor

from ..base.options import require_choice


MIN_GROUP_STD = 0.05


def _check_combination(rows: int, group_size: int, mode: str, gate: str) -> None:
    require_choice("mode", mode, ("split", "total", "token"))
    require_choice("gate", gate, ("always", "correct_only"))
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size={group_size} is no divisor of the {rows} rows; give one.")


def combine_advantages(
    task_advantages: Tensor,
    rhythm_rewards: Tensor,
    group_size: int,
    lam: float = 0.1,
    mode: str = "split",
    *,
    gate: str = "always",
    correct: Tensor | None = None,
    task_rewards: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantages from task reward and rhythm; groups are consecutive rows and must be whole (gather over ranks first).

    - "split": A_i + lam (Rbar_i - group mean) / max(group std, 0.05).
    - "total": GRPO on R_task + lam Rbar. In a group of equal task rewards z-scoring cancels lam: rhythm alone then
      makes full-size updates, which is why "split" is the default.
    - "token": A_i + lam (r_it - mean over all tokens of the group).

    The standard deviation is the unbiased one, as in TRL.

    Args:
        task_advantages: (B,) GRPO advantages of the task reward.
        rhythm_rewards: (B,) Rbar; (B, T) r_t for mode "token".
        group_size: completions per prompt.
        lam: weight of rhythm; 0 returns `task_advantages` itself.
        gate: "always", or "correct_only": wrong answers get no rhythm and do not enter the group's statistics (in mode
            "total" their rhythm counts as 0).
        correct: (B,) boolean, for gate "correct_only".
        task_rewards: (B,), for mode "total"; NaN where the task gave none: advantage 0, left out of the group.
        mask: (B, T) boolean, response tokens, for mode "token".

    Returns:
        (B,), or (B, T) for mode "token", in the dtype of `task_advantages`.

    Raises:
        ValueError: for an unknown mode or gate, a missing argument, or rows that do not make whole groups.
    """
    _check_combination(len(task_advantages), group_size, mode, gate)
    if lam == 0:
        return task_advantages
    if gate == "correct_only" and correct is None:
        raise ValueError("correct=None; gate 'correct_only' needs it.")
    if mode == "total" and task_rewards is None:
        raise ValueError("task_rewards=None; mode 'total' needs them.")
    if mode == "token" and mask is None:
        raise ValueError("mask=None; mode 'token' needs it.")
    counted = torch.ones_like(task_advantages, dtype=torch.bool) if gate == "always" else correct.bool()  # (B,)
    if mode == "total":
        scored = ~task_rewards.isnan()
        total = task_rewards + lam * torch.where(counted, rhythm_rewards, 0.0)
        mean, std = _group_statistics(total[:, None], scored[:, None], group_size)
        return torch.where(scored, (total - mean) / (std + 1e-4), 0.0).to(task_advantages.dtype)
    if mode == "token":
        counted = counted[:, None] & mask.bool()  # (B, T)
        mean, _ = _group_statistics(rhythm_rewards, counted, group_size)
        rhythm = torch.where(counted, rhythm_rewards - mean[:, None], 0.0)
        return (task_advantages[:, None] + lam * rhythm).to(task_advantages.dtype)
    mean, std = _group_statistics(rhythm_rewards[:, None], counted[:, None], group_size)
    rhythm = torch.where(counted, (rhythm_rewards - mean) / std.clamp(min=MIN_GROUP_STD), 0.0)
    return (task_advantages + lam * rhythm).to(task_advantages.dtype)


def _group_statistics(values: Tensor, counted: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (B,) over the counted entries of each row's group, from (B, T)."""
    values = torch.where(counted, values, 0.0).reshape(-1, group_size * values.shape[1]).double()  # (groups, entries)
    counted = counted.reshape(values.shape)
    count = counted.sum(1, keepdim=True)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(counted, values - mean, 0.0).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return mean.squeeze(1).repeat_interleave(group_size), variance.sqrt().squeeze(1).repeat_interleave(group_size)
