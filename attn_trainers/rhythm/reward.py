"""The rhythm reward: R_total = R_task + lambda * R_rhythm, where R_rhythm says how well attention alternates.

A response is cut into chunks at the peaks of WAAD. A chunk is in rhythm when attention is broad at its start
(preplan), concentrated on few anchors in the rest, and when its own anchor sits near its start. This reward is not in
the paper (arXiv 2510.13554 keeps the reward and scales advantages); it builds on the paper's signals WAAD and FAI.

Two passes over attention, since the anchors that concentration is measured on depend on the FAI of all rows:

1. the ordinary forward gives WAAD and FAI and keeps queries and keys of the chosen heads (five layers at most);
2. `breadth_and_concentration` recomputes those heads' rows block by block; no T x T tensor is formed.

Breadth and concentration want the mean map of heads that lie in several layers, which one forward, layer by layer,
never holds at once: both are therefore taken in the second pass. Head sets should be fixed (calibrated once), as a
reward needs a stable definition.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_trainers.rhythm.analysis import peaks
from attn_trainers.rhythm.credit import anchor_tokens


ANCHOR_FRACTION = 0.1  # S, the anchors that concentration is measured on
KEY_FRACTION = 0.4  # T_glob, the anchors that a chunk's strongest token must belong to
PEAK_FRACTION = 0.3
MIN_CHUNK_TOKENS = 4
MIN_RESPONSE_TOKENS = 8
PREPLAN_TOKENS = 2  # tokens at a chunk's start where attention should be broad
KEY_REACH = 3  # a chunk's anchor should lie at most so many tokens after its start
PREPLAN_WEIGHT, ANCHOR_WEIGHT, KEY_WEIGHT = 0.4, 0.4, 0.2
MIN_GROUP_STD = 0.05


@dataclass(frozen=True)
class RhythmRewardOptions:
    """How a response's rhythm is measured.

    Args:
        rank: breadth and concentration enter as their rank within the response, so that only their arrangement in time
            counts and not how flat or sharp attention is; False: as their values.
        norm: the response's value: "token_mean" (mean over tokens), "chunk_mean", or "sum" over chunks, which grows
            with length.
        segment: chunks start at "waad" peaks or, with "newline", at the line starts that the caller gives.

    Raises:
        ValueError: for an unknown norm or segment.
    """

    rank: bool = True
    norm: str = "token_mean"
    segment: str = "waad"

    def __post_init__(self) -> None:
        if self.norm not in ("token_mean", "chunk_mean", "sum"):
            raise ValueError(f"norm is {self.norm!r}: choose one of token_mean, chunk_mean, sum")
        if self.segment not in ("waad", "newline"):
            raise ValueError(f"segment is {self.segment!r}: choose one of waad, newline")


@dataclass(frozen=True)
class RhythmReward:
    """Rhythm of one response of n tokens, C chunks.

    Attributes:
        per_token: (n,) r_t, the reward of the token's chunk, -1 to 1.
        mean: Rbar, -1 to 1 (under norm "sum" the sum over chunks); 0 where the response is too short or a signal is
            nowhere defined.
        chunk_starts: (C,) index of each chunk's first token, from 0.
        chunk_rewards: (C,) R_rhythm of each chunk.
    """

    per_token: Tensor
    mean: float
    chunk_starts: Tensor
    chunk_rewards: Tensor


def attention_row_blocks(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    first_row: int,
    *,
    block_rows: int = 256,
    scaling: float | None = None,
    windows: Sequence[int | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the mean attention map over all given heads, block by block, in float32.

    Args:
        queries: per layer (H_l, N, d), after norm and rotary embedding, chosen heads only, without padding.
        keys: per layer (H_l, N, d), the key head of each query head.
        first_row: absolute position of the first row wanted; the last is N - 1.
        scaling: factor of the logits; None: d ** -0.5.
        windows: per layer the sliding window in tokens (a row sees itself and window - 1 before it), or None.

    Yields:
        rows (r, K) and their absolute positions (r,), where K is the last of them + 1.
    """
    heads = sum(len(query) for query in queries)
    length = queries[0].shape[1]
    windows = windows or [None] * len(queries)
    for start in range(first_row, length, block_rows):
        positions = torch.arange(start, min(start + block_rows, length), device=queries[0].device)  # (r,)
        key_count = min(start + block_rows, length)
        distance = positions[:, None] - torch.arange(key_count, device=positions.device)  # (r, K)
        rows = torch.zeros(distance.shape, dtype=torch.float32, device=positions.device)
        for query, key, window in zip(queries, keys, windows, strict=True):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            logits = (
                query[:, start:key_count].float() @ key[:, :key_count].float().transpose(1, 2) * scale
            )  # (H, r, K)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            rows += logits.masked_fill(hidden, -math.inf).softmax(-1).sum(0)
        yield rows / heads, positions


def row_breadth(rows: Tensor, positions: Tensor, sink_tokens: int = 1) -> Tensor:
    """Breadth b_t (r,) in [0, 1]: entropy of a row over its past and itself, over the entropy of a uniform row.

    Args:
        rows: (r, K) attention rows, summing to 1 over keys 0..t.
        positions: (r,) absolute position t of each row.
        sink_tokens: keys left out at the start of the sequence; the rest is renormalised.

    Returns:
        (r,), NaN where fewer than two keys or no mass are left.
    """
    seen = torch.arange(rows.shape[1], device=rows.device) <= positions[:, None]
    mass = rows.masked_fill(~seen, 0.0)[:, sink_tokens:]  # (r, K - sink)
    shares = mass / mass.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1)
    count = positions + 1 - sink_tokens
    return torch.where(count >= 2, entropy / count.clamp(min=2).log(), math.nan)


def row_concentration(rows: Tensor, positions: Tensor, anchors: Tensor, prompt_length: int) -> Tensor:
    """Concentration c_t (r,) = (M_t - p_t) / (1 - p_t): attention to anchors beyond their share of tokens.

    M_t is the share of the row's mass on earlier response tokens that falls on anchors, p_t the share of those tokens
    that are anchors: 1 is all on anchors, 0 chance, negative avoidance.

    Args:
        rows: (r, K) attention rows.
        positions: (r,) absolute position of each row, in the response.
        anchors: (n,) boolean mask over response tokens, the set S.
        prompt_length: absolute position of the first response token.

    Returns:
        (r,), NaN where there is no earlier response token, no mass on one, or none but anchors.
    """
    response_keys = torch.arange(rows.shape[1] - prompt_length, device=rows.device)  # (k,), index in the response
    earlier = response_keys < (positions - prompt_length)[:, None]  # (r, k)
    mass = rows[:, prompt_length:].masked_fill(~earlier, 0.0)
    on_anchors = anchors[: len(response_keys)]  # (k,)
    share = (mass * on_anchors).sum(1) / mass.sum(1)  # M_t
    chance = (earlier & on_anchors).sum(1) / earlier.sum(1)  # p_t
    return torch.where(chance < 1, (share - chance) / (1 - chance), math.nan)


@torch.no_grad()
def breadth_and_concentration(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    fai: Tensor,
    prompt_length: int,
    *,
    sink_tokens: int = 1,
    **blocks,
) -> tuple[Tensor, Tensor]:
    """Second pass: breadth and concentration (n,) of every response token, float32.

    Args:
        queries, keys: per layer (H_l, N, d), the global heads, as in `attention_row_blocks`.
        blocks: its keywords.
        fai: (n,) with n = N - prompt_length; its top tenth is the anchor set S.
        prompt_length: number of prompt tokens.

    Raises:
        ValueError: if the lengths do not add up.
    """
    if queries[0].shape[1] != prompt_length + len(fai):
        raise ValueError(
            f"queries hold {queries[0].shape[1]} positions: give prompt_length + len(fai) = {prompt_length + len(fai)}"
        )
    anchors = anchor_tokens(fai, ANCHOR_FRACTION)
    breadth, concentration = torch.empty(2, len(fai), dtype=torch.float32, device=queries[0].device)
    for rows, positions in attention_row_blocks(queries, keys, prompt_length, **blocks):
        breadth[positions - prompt_length] = row_breadth(rows, positions, sink_tokens)
        concentration[positions - prompt_length] = row_concentration(rows, positions, anchors, prompt_length)
    return breadth, concentration


def unit_ranks(values: Tensor) -> Tensor:
    """Ranks (n,) of (n,), scaled to [0, 1], ties averaged; NaN, and a lone value, give 0.5."""
    ranks = torch.full_like(values, 0.5, dtype=torch.float64)
    defined = ~values.isnan()
    count = int(defined.sum())
    if count > 1:
        _, inverse, counts = values[defined].unique(return_inverse=True, return_counts=True)
        average = counts.cumsum(0).double() - (counts.double() + 1) / 2  # mean of a tie's ranks, from 0
        ranks[defined] = average[inverse] / (count - 1)
    return ranks


def chunk_starts(starts: Tensor, n: int) -> Tensor:
    """First tokens (C,) of a response's chunks: 0 and those of the candidate `starts` that leave no chunk too short.

    A candidate is dropped if it lies less than 4 tokens after the previous start or less than 4 before the end.
    """
    kept = [0]
    for start in sorted(starts.tolist()):
        if start - kept[-1] >= MIN_CHUNK_TOKENS and n - start >= MIN_CHUNK_TOKENS:
            kept.append(start)
    return torch.tensor(kept, device=starts.device)


def _chunk_means(values: Tensor, chunk: Tensor, chunks: int, within: Tensor) -> Tensor:
    sums = values.new_zeros(chunks).index_add_(0, chunk[within], values[within])
    return sums / torch.bincount(chunk[within], minlength=chunks)


def _key_at_start(fai: Tensor, chunk: Tensor, starts: Tensor) -> Tensor:
    """Km (C,): 1 where the chunk's strongest token is an anchor of the response near the chunk's start, else 0."""
    n, chunks = len(fai), len(starts)
    strength = fai.masked_fill(fai.isnan(), -math.inf)
    strongest = strength.new_full((chunks,), -math.inf).scatter_reduce(0, chunk, strength, "amax")
    index = torch.arange(n, device=fai.device)
    candidate = torch.where(strength == strongest[chunk], index, n - 1)
    first = torch.full_like(starts, n - 1).scatter_reduce(0, chunk, candidate, "amin")  # lowest index on ties
    is_key = anchor_tokens(fai, KEY_FRACTION)[first] & (first <= starts + KEY_REACH)
    return is_key.double()


@torch.no_grad()
def rhythm_reward(
    waad: Tensor,
    fai: Tensor,
    breadth: Tensor,
    concentration: Tensor,
    options: RhythmRewardOptions | None = None,
    *,
    line_starts: Tensor | None = None,
) -> RhythmReward:
    """Rhythm of one response: per chunk C = [a, e), R(C) = 2 (0.4 Pm + 0.4 Am + 0.2 Km) - 1.

    Pm is the mean rank of breadth on the chunk's first two tokens, Am that of concentration on the others, Km whether
    its strongest token (by FAI) is among the response's anchors and at most 3 tokens after a. On independent noise of
    200 tokens the value is 0.02 on average, with standard deviation 0.05.

    Args:
        waad, fai, breadth, concentration: (n,); NaN in the last three where undefined.
        line_starts: indices of the tokens that begin a line, for segment "newline".

    Raises:
        ValueError: for unequal shapes, or segment "newline" without line_starts.
    """
    options = options or RhythmRewardOptions()
    signals = {"waad": waad, "fai": fai, "breadth": breadth, "concentration": concentration}
    for name, signal in signals.items():
        if signal.shape != waad.shape or signal.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(signal.shape)}: give one value per token, as many as waad")
    if options.segment == "newline" and line_starts is None:
        raise ValueError("line_starts is None: segment 'newline' needs the index of each line's first token")
    n = len(waad)
    if n < MIN_RESPONSE_TOKENS or any(bool(signal.isnan().all()) for signal in signals.values()):
        zeros = torch.zeros_like(waad)
        return RhythmReward(zeros, 0.0, torch.zeros(min(n, 1), dtype=torch.long, device=waad.device), zeros[:1])

    candidates = line_starts if options.segment == "newline" else peaks(waad, PEAK_FRACTION).nonzero().squeeze(1)
    starts = chunk_starts(candidates, n).to(waad.device)
    index = torch.arange(n, device=waad.device)
    chunk = torch.searchsorted(starts, index, right=True) - 1  # (n,)
    in_preplan = index < starts[chunk] + PREPLAN_TOKENS
    if options.rank:
        broad, focused = unit_ranks(breadth), unit_ranks(concentration)
    else:
        broad = breadth.double().nan_to_num(nan=0.5)
        focused = ((concentration.double().clamp(-1, 1) + 1) / 2).nan_to_num(nan=0.5)
    score = PREPLAN_WEIGHT * _chunk_means(broad, chunk, len(starts), in_preplan)
    score += ANCHOR_WEIGHT * _chunk_means(focused, chunk, len(starts), ~in_preplan)
    score += KEY_WEIGHT * _key_at_start(fai.double(), chunk, starts)
    chunk_rewards = (2 * score - 1).clamp(-1, 1)  # rounding alone could leave the range
    per_token = chunk_rewards[chunk]
    value = {"token_mean": per_token.mean(), "chunk_mean": chunk_rewards.mean(), "sum": chunk_rewards.sum()}[
        options.norm
    ]
    return RhythmReward(per_token.to(waad.dtype), value.item(), starts, chunk_rewards.to(waad.dtype))


def _check_combination(rows: int, group_size: int, mode: str, gate: str) -> None:
    if mode not in ("split", "total", "token"):
        raise ValueError(f"mode is {mode!r}: choose one of split, total, token")
    if gate not in ("always", "correct_only"):
        raise ValueError(f"gate is {gate!r}: choose one of always, correct_only")
    if group_size < 1 or rows % group_size:
        raise ValueError(f"group_size is {group_size}: give a divisor of the number of rows, {rows}")


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
        raise ValueError("correct is None: gate 'correct_only' needs it")
    if mode == "total" and task_rewards is None:
        raise ValueError("task_rewards is None: mode 'total' needs it")
    if mode == "token" and mask is None:
        raise ValueError("mask is None: mode 'token' needs it")
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


def rhythm_metrics(means: Tensor, correct: Tensor, lengths: Tensor, chunks: Tensor) -> dict[str, float]:
    """What to watch of a batch's rhythm: values by correctness, correlations, chunk density; NaN where not defined.

    Args:
        means: (B,) Rbar. correct: (B,) boolean. lengths: (B,) tokens. chunks: (B,) number of chunks.
    """
    means, lengths, correct = means.double(), lengths.double(), correct.bool()
    return {
        "reward_correct": means[correct].mean().item(),
        "reward_wrong": means[~correct].mean().item(),
        "correlation_correct": torch.corrcoef(torch.stack([means, correct.double()]))[0, 1].item(),
        "correlation_length": torch.corrcoef(torch.stack([means, lengths]))[0, 1].item(),
        "chunks_per_100_tokens": (100 * chunks.sum() / lengths.sum()).item(),
    }
