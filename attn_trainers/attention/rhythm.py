"""Look-back distance and future influence of every response token (arXiv 2510.13554, sections 3 to 5).

Per head, with A the causal attention weights of one sequence of N tokens and R its response:
    d = mean over t in R of sum_s A[t, s] (t - s)                           mean backward span, eq. 7
    WAAD_t = sum_{s <= t} A[t, s] min(t - s, W)                             windowed average attention distance, eq. 9
    FAI_s = mean over t in R, s + lo <= t <= min(N - 1, s + hi), of A[t, s] future attention influence, eq. 10
All three are linear in A, so they are kept per head and averaged once the heads are ranked by d: local heads have the
shortest span, global heads the longest.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .capture import LayerAttention
from .heads import Head
from .observers import BatchObserver, check_positions
from .pooling import SCORE_BUDGET, fused_attention, membership, row_weights


Horizon = tuple[int, int | None]

BAND = 128
"""Query rows handled at once, and least number of tokens in a block of keys."""


class HeadSums(NamedTuple):
    """What the H heads of one layer say about n rows of one sequence: span (H,), waad and fai (H, n), float32."""

    span: Tensor
    waad: Tensor
    fai: Tensor


@dataclass
class RhythmProfile:
    """What every candidate head says about one sequence with n response tokens.

    Attributes:
        heads: the C candidates as (layer, query head), ascending.
        span_sum: (C,) float32, sum over the response tokens of the backward span, in tokens.
        waad: (C, n) float32, in tokens, 0 to W.
        fai: (C, n) float32, attention weights, NaN where no later token is within the horizon.
    """

    heads: list[Head]
    span_sum: Tensor
    waad: Tensor
    fai: Tensor


@dataclass
class RhythmSignals:
    """The rhythm of one response of n tokens.

    Attributes:
        waad: (n,) float32, mean over the local heads, in tokens, 0 to W.
        fai: (n,) float32, mean over the global heads, attention weights, NaN where undefined (the last lo tokens).
        local_heads: (layer, head) pairs of shortest mean backward span, ascending by span.
        global_heads: those of longest mean backward span, ascending by span.
        mean_backward_span: (C,) float32, d of every candidate head, ascending by (layer, head), in tokens.
    """

    waad: Tensor
    fai: Tensor
    local_heads: list[Head]
    global_heads: list[Head]
    mean_backward_span: Tensor


def mean_backward_span(profiles: Sequence[RhythmProfile]) -> Tensor:
    """d of every candidate head over all response tokens of the given sequences, each weighing the same: (C,)."""
    tokens = sum(profile.waad.shape[-1] for profile in profiles)
    return torch.stack([profile.span_sum for profile in profiles]).sum(dim=0) / max(tokens, 1)


def combine_heads(profile: RhythmProfile, local_heads: Sequence[Head], global_heads: Sequence[Head]) -> RhythmSignals:
    """Average a sequence's WAAD over the local heads and its FAI over the global heads (eq. 8).

    Raises:
        ValueError: for a head that is not among the profile's candidates, or an empty set.
    """
    place = {head: i for i, head in enumerate(profile.heads)}
    for name, chosen in (("local_heads", local_heads), ("global_heads", global_heads)):
        unknown = [head for head in chosen if tuple(head) not in place]
        if unknown or not chosen:
            layers = sorted({layer for layer, _ in profile.heads})
            raise ValueError(f"{name}={list(chosen)}: name one or more heads of the observed layers {layers}.")
    return RhythmSignals(
        waad=profile.waad[[place[tuple(head)] for head in local_heads]].mean(dim=0),
        fai=profile.fai[[place[tuple(head)] for head in global_heads]].mean(dim=0),
        local_heads=[tuple(head) for head in local_heads],
        global_heads=[tuple(head) for head in global_heads],
        mean_backward_span=mean_backward_span([profile]),
    )


class RhythmObserver(BatchObserver):
    """Collects every candidate head's profile of every sequence.

    Args:
        attention_mask: (B, T), 1 for real tokens.
        prompt_lengths: per row, number of prompt tokens, padding left out.
        layers: layers whose query heads are the candidates.
        window: W of WAAD, in tokens.
        horizon: (lo, hi) of FAI, in tokens; hi None reaches to the end of the response.

    Raises:
        ValueError: for no layers, a window below 1, a horizon that is empty or negative, or lengths off the sequences.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        prompt_lengths: Sequence[int],
        layers: Iterable[int],
        window: int = 10,
        horizon: Horizon = (10, 100),
    ):
        super().__init__(attention_mask, layers=frozenset(int(layer) for layer in layers))
        low, high = horizon
        if not self.layers:
            raise ValueError("layers=[]: name at least one layer.")
        if window < 1:
            raise ValueError(f"window={window}: must be 1 token or more (the paper uses 10).")
        if low < 0 or (high is not None and high < low):
            raise ValueError(f"horizon={tuple(horizon)}: give 0 <= lo <= hi, or hi None for the end of the response.")
        self.prompt_lengths = check_positions("prompt_lengths", prompt_lengths, [count for _, count in self.spans])
        self.window = window
        self.horizon = (low, high)
        self._num_heads: dict[int, int] = {}
        self._profiles: list[dict[int, HeadSums]] = [{} for _ in self.spans]
        self._device = attention_mask.device

    def observe(self, layer: LayerAttention) -> None:
        self._num_heads[layer.layer_idx] = layer.query.shape[1]
        super().observe(layer)

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        self._profiles[row][layer.layer_idx] = rhythm_sums(
            query,
            key,
            layer.scaling,
            layer.sliding_window,
            first_row=self.prompt_lengths[row],
            window=self.window,
            horizon=self.horizon,
        )

    def result(self) -> list[RhythmProfile]:
        """One profile per row; with n = 0 for a row without response tokens.

        Raises:
            ValueError: where a layer has not shown every row.
        """
        self.check_complete()
        layers = sorted(self._num_heads)
        heads = [(layer, head) for layer in layers for head in range(self._num_heads[layer])]
        empty = [
            HeadSums(torch.zeros(self._num_heads[layer]), *torch.zeros(2, self._num_heads[layer], 0))
            for layer in layers
        ]
        profiles = []
        for parts in self._profiles:
            rows = [parts[layer] for layer in layers] if parts else empty
            span_sum, waad, fai = (torch.cat(tensors).to(self._device) for tensors in zip(*rows, strict=True))
            profiles.append(RhythmProfile(heads=heads, span_sum=span_sum, waad=waad, fai=fai))
        return profiles


def rhythm_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sliding_window: int | None,
    *,
    first_row: int,
    window: int,
    horizon: Horizon,
) -> HeadSums:
    """Backward spans, WAAD and FAI of one layer and one sequence, for the rows from `first_row` on, n of them.

    Where FAI's horizon is bounded, only a band of weights below the diagonal is computed: a fused call gives each
    row's attention mass on every block of keys, and its mean position within them, and the weights within the band are
    a softmax over the band's blocks times their mass. With an unbounded horizon or a sliding window the weights on all
    visible keys are computed, a block of rows at a time.

    Args:
        query: (H, N, D).
        key: (Hkv, N, D).
        scaling: factor of the logits.
        sliding_window: tokens a query sees, itself included; None for all.
        first_row: first response token.
        window: W of WAAD.
        horizon: (lo, hi) of FAI.

    Returns:
        Span sums (H,), WAAD (H, n) and FAI (H, n), float32.
    """
    length = query.shape[1]
    low, high = horizon
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    reach = None if high is None else max(window, high)
    sums = _RhythmSums(query, first_row, window, low, high)
    if first_row == length:
        return sums.result()
    if sliding_window is None and reach is not None:
        _add_bands(query, key, scaling, first_row, reach, sums)
    else:
        _add_whole_rows(query, key, scaling, sliding_window, first_row, sums)
    return sums.result()


class _RhythmSums:
    """Running sums over blocks of rows."""

    def __init__(self, query: Tensor, first_row: int, window: int, low: int, high: int | None):
        heads, self.length = query.shape[:2]
        self.first_row, self.window, self.low, self.high = first_row, window, low, high
        self.span = torch.zeros(heads, dtype=torch.float32, device=query.device)
        self.received = torch.zeros(heads, self.length, dtype=torch.float32, device=query.device)  # (H, N)
        self.waad = torch.zeros_like(self.received)

    def add(self, weights: Tensor, distance: Tensor, rows: range) -> None:
        """Add a block of rows: weights (H, R, K) on the K keys up to the last row, distances (R, K)."""
        self.waad[:, rows.start : rows.stop] += (weights * distance.clamp(0, self.window)).sum(dim=-1)
        ahead = distance >= self.low if self.high is None else (distance >= self.low) & (distance <= self.high)
        self.received[:, rows.stop - distance.shape[1] : rows.stop] += (weights * ahead).sum(dim=1)

    def result(self) -> HeadSums:
        position = torch.arange(self.first_row, self.length, device=self.span.device)
        last = torch.full_like(position, self.length - 1)
        if self.high is not None:
            last = last.minimum(position + self.high)
        count = (last - position - self.low + 1).float()  # (n,) rows within the horizon of each token
        fai = self.received[:, self.first_row :] / count
        return HeadSums(self.span, self.waad[:, self.first_row :], fai.masked_fill(count <= 0, torch.nan))


def _add_bands(query: Tensor, key: Tensor, scaling: float, first_row: int, reach: int, sums: _RhythmSums) -> None:
    length, width = query.shape[1:]
    size = max(BAND, math.ceil(length / (width - 1)))  # tokens per block of keys, so that one column is left over
    starts = list(range(0, length, size))
    value = membership(starts, [start + size for start in starts], 0, length, query)
    position = torch.arange(length, device=query.device)
    value[:, len(starts)] = (position % size).to(value.dtype)
    mass = fused_attention(query, key, value, scaling, causal=True).float()  # (H, N, D)
    # Distances are taken to each block's start first: a span of a few tokens is no difference of two large positions.
    behind = position[first_row:, None] - torch.tensor(starts, device=query.device)  # (n, blocks)
    span = (mass[:, first_row:, : len(starts)] * behind).sum(dim=-1) - mass[:, first_row:, len(starts)]  # (H, n)
    sums.span += span.sum(dim=-1)
    for first in range(first_row, length, BAND):
        rows = range(first, min(first + BAND, length))
        block = max(0, first - reach) // size
        weights, distance = row_weights(query, key, scaling, None, rows, starts[block])
        before, within = mass[:, first : rows.stop, : len(starts)].split([block, len(starts) - block], dim=-1)
        weights *= within.sum(dim=-1, keepdim=True)
        # Every key before the band is at distance W or more.
        sums.waad[:, first : rows.stop] += sums.window * before.sum(dim=-1)
        sums.add(weights, distance, rows)


def _add_whole_rows(
    query: Tensor, key: Tensor, scaling: float, sliding_window: int | None, first_row: int, sums: _RhythmSums
) -> None:
    heads, length = query.shape[:2]
    first = first_row
    while first < length:
        size = min(BAND, max(1, SCORE_BUDGET // (heads * length)))
        rows = range(first, min(first + size, length))
        begin = 0 if sliding_window is None else max(0, first - sliding_window + 1)
        weights, distance = row_weights(query, key, scaling, sliding_window, rows, begin)
        sums.span += (weights * distance).sum(dim=(1, 2))
        sums.add(weights, distance, rows)
        first = rows.stop


def peaks(values: Tensor, fraction: float = 0.3) -> Tensor:
    """Mask (n,) of local maxima of (n,) that lie in the response's top `fraction`.

    t is a peak if x_t > x_{t-1}, x_t >= x_{t+1} and x_t is at least the (1 - fraction) quantile; beyond the ends and
    where undefined (NaN) x counts as -inf. Independent noise has 21.9 % peaks.
    """
    defined = ~values.isnan()
    if not defined.any():
        return torch.zeros_like(values, dtype=torch.bool)
    values = values.double()
    threshold = torch.nanquantile(values, 1.0 - fraction)
    edge = values.new_full((1,), -math.inf)
    padded = torch.cat([edge, values.masked_fill(~defined, -math.inf), edge])  # (n + 2,)
    centre = padded[1:-1]
    return defined & (centre > padded[:-2]) & (centre >= padded[2:]) & (centre >= threshold)
