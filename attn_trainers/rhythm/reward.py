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
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.rhythm import peaks
from .credit import anchor_tokens
from .options import RhythmRewardOptions


KEY_FRACTION = 0.4  # T_glob, the anchors that a chunk's strongest token must belong to
PEAK_FRACTION = 0.3
MIN_CHUNK_TOKENS = 4
MIN_RESPONSE_TOKENS = 8
PREPLAN_TOKENS = 2  # tokens at a chunk's start where attention should be broad
KEY_REACH = 3  # a chunk's anchor should lie at most so many tokens after its start
PREPLAN_WEIGHT, ANCHOR_WEIGHT, KEY_WEIGHT = 0.4, 0.4, 0.2


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
            raise ValueError(f"{name} has shape {tuple(signal.shape)}; give one value per token, as many as waad.")
    if options.reward_segment == "newline" and line_starts is None:
        raise ValueError("line_starts=None; reward_segment='newline' needs the index of each line's first token.")
    n = len(waad)
    if n < MIN_RESPONSE_TOKENS or any(bool(signal.isnan().all()) for signal in signals.values()):
        zeros = torch.zeros_like(waad)
        return RhythmReward(zeros, 0.0, torch.zeros(min(n, 1), dtype=torch.long, device=waad.device), zeros[:1])

    candidates = (
        line_starts if options.reward_segment == "newline" else peaks(waad, PEAK_FRACTION).nonzero().squeeze(1)
    )
    starts = chunk_starts(candidates, n).to(waad.device)
    index = torch.arange(n, device=waad.device)
    chunk = torch.searchsorted(starts, index, right=True) - 1  # (n,)
    in_preplan = index < starts[chunk] + PREPLAN_TOKENS
    if options.reward_rank:
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
        options.reward_norm
    ]
    return RhythmReward(per_token.to(waad.dtype), value.item(), starts, chunk_rewards.to(waad.dtype))
