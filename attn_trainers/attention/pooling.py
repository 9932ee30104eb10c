"""Sums of attention weights, without ever holding the weights.

A fused attention kernel computes softmax(q kᵀ · scaling) · V in one pass. With V[t, c] = 1 where token t belongs to
group c it returns, for every query, the attention mass on every group: the step-to-step attention of all heads for the
price of a second attention call. The kernels want V as wide as the head dimension D; more than D groups are split in
two levels, by
    mass(step) = mass(block of steps) · softmax within the block (step),
so any number of steps costs two passes over the keys, not one per D steps, and no mask is needed.

All functions take one sequence, padding removed: query (H, n, D), key (Hkv, n, D), as in `LayerAttention`. Kernels
accumulate in float32; results are float32.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


QUERY_BLOCK = 256
"""Queries handled at once in sliding-window layers."""

SCORE_BUDGET = 2**22
"""Attention weights held at once where they are needed themselves: 16 MiB of float32."""


def membership(starts: Sequence[int], ends: Sequence[int], first: int, last: int, query: Tensor) -> Tensor:
    """Value matrix (last - first, D): [t, c] is 1 where token first + t is in [starts[c], ends[c]), else 0."""
    token = torch.arange(first, last, device=query.device)[:, None]
    columns = query.new_zeros(last - first, query.shape[-1])
    edges = torch.tensor([starts, ends], device=query.device)  # (2, C)
    columns[:, : len(starts)] = ((token >= edges[0]) & (token < edges[1])).to(query.dtype)
    return columns


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(query · keyᵀ · scaling) · value for one value matrix shared by all heads.

    Args:
        query: (H, Q, D).
        key: (Hkv, K, D).
        value: (K, D).
        causal: query i sees keys 0 to i (Q = K).
        mask: (Q, K) bool, True where a query sees a key.

    Returns:
        (H, Q, D), in the dtype of `query`.
    """
    grouped = key.shape[0] != query.shape[0]
    if grouped and query.is_cuda and (mask is not None or query.dtype == torch.float32):
        # Only the flash kernel knows grouped heads; the memory-efficient one, which takes masks and float32, does not.
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        grouped = False
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value.expand(1, key.shape[0], *value.shape),
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )[0]


def lagged_step_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sliding_window: int | None,
    steps: list[tuple[int, int]],
    columns: range,
    delta: int,
    aggregation: str = "sum",
) -> Tensor:
    """Attention that each step of `columns` receives from the steps at least `delta` after it, per head.

    y[h, k] = sum over steps j >= k + delta of alpha[h, j, k], where alpha is the mean over the query tokens of j and
    over the key tokens of k of the attention weights (AttnRL eq. 5 and 6, for one layer). The mean over these steps
    does not grow with their number, as the sum does, which early steps have more of.

    Args:
        query: (H, n, D).
        key: (Hkv, n, D).
        scaling: factor of the logits.
        sliding_window: tokens a query sees, itself included; None for all.
        steps: all steps of the sequence as half-open token ranges, ascending, disjoint, none empty.
        columns: consecutive indices k of `steps` to compute; each k + delta is an index of `steps`.
        delta: least distance in steps.
        aggregation: over the later steps, "sum" (published) or "mean".

    Returns:
        (H, len(columns)) float32.
    """
    sums = query.new_zeros(query.shape[0], len(columns), dtype=torch.float32)
    if not columns:
        return sums
    rows = _RowWeights(query, steps, [steps[k + delta][0] for k in columns])
    starts, ends = zip(*(steps[k] for k in columns), strict=True)
    if sliding_window is not None and sliding_window < query.shape[1]:
        _pool_windowed(query, key, scaling, sliding_window, starts, ends, rows, sums)
    elif len(columns) <= query.shape[-1]:
        value = membership(starts, ends, 0, query.shape[1], query)
        sums += rows.weighted(fused_attention(query, key, value, scaling, causal=True), 0, 0)
    else:
        _pool_two_levels(query, key, scaling, starts, ends, rows, sums)
    later = [len(steps) - delta - k if aggregation == "mean" else 1 for k in columns]
    sizes = [(end - start) * count for start, end, count in zip(starts, ends, later, strict=True)]
    return sums / torch.tensor(sizes, device=sums.device)


class _RowWeights:
    """Weight of each query row in each column's sum: 1 / |step of the row| from the column's first row on, else 0."""

    def __init__(self, query: Tensor, steps: list[tuple[int, int]], first_rows: list[int]):
        weight = torch.zeros(query.shape[1], dtype=torch.float32)  # (n,); tokens in no step weigh nothing
        for start, end in steps:
            weight[start:end] = 1.0 / (end - start)
        self.weight = weight.to(query.device)
        self.first_rows = first_rows
        self._first_rows = torch.tensor(first_rows, device=query.device)  # (C,)

    def weighted(self, masses: Tensor, first_row: int, first_column: int) -> Tensor:
        """Weighted sum over the rows of (H, R, width) masses: (H, columns). Rows and columns begin at those given."""
        columns = self._first_rows[first_column : first_column + masses.shape[-1]]  # (C',)
        rows = torch.arange(first_row, first_row + masses.shape[1], device=masses.device)[:, None]
        weight = self.weight[first_row : first_row + masses.shape[1], None] * (rows >= columns)  # (R, C')
        return (masses[..., : columns.shape[0]] * weight).sum(dim=1)


def _pool_two_levels(
    query: Tensor, key: Tensor, scaling: float, starts: tuple, ends: tuple, rows: _RowWeights, sums: Tensor
) -> None:
    """Add every column's weighted sum to `sums` (H, C), for any number of columns."""
    length, width = query.shape[1:]
    num_blocks = min(width, math.ceil(len(starts) / width))
    size = math.ceil(len(starts) / num_blocks)
    firsts = list(range(0, len(starts), size))
    lasts = [min(first + size, len(starts)) for first in firsts]
    block_starts, block_ends = [starts[c] for c in firsts], [ends[c - 1] for c in lasts]
    value = membership(block_starts, block_ends, 0, length, query)
    block_mass = fused_attention(query, key, value, scaling, causal=True)  # (H, n, D)
    for block, (begin, end) in enumerate(zip(block_starts, block_ends, strict=True)):
        for c in range(firsts[block], lasts[block], width):
            c_end = min(c + width, lasts[block])
            value = membership(starts[c:c_end], ends[c:c_end], begin, end, query)
            keys = key[:, begin:end]
            target = sums[:, c:c_end]
            # Rows within the block see the keys before them, rows after it see all of them: no mask in either case.
            if rows.first_rows[c] < end:
                mass = fused_attention(query[:, begin:end], keys, value, scaling, causal=True)[..., : c_end - c]
                target += rows.weighted(mass.float() * block_mass[:, begin:end, block, None], begin, c)
            after = max(end, rows.first_rows[c])
            mass = fused_attention(query[:, after:], keys, value, scaling)[..., : c_end - c]
            target += rows.weighted(mass.float() * block_mass[:, after:, block, None], after, c)


def _pool_windowed(
    query: Tensor,
    key: Tensor,
    scaling: float,
    window: int,
    starts: tuple,
    ends: tuple,
    rows: _RowWeights,
    sums: Tensor,
) -> None:
    """Add every column's weighted sum to `sums` (H, C), by blocks of queries and the keys that their windows reach."""
    length, width = query.shape[1:]
    for first in range(rows.first_rows[0], length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        begin = max(0, first - window + 1)
        distance = torch.arange(first, last, device=query.device)[:, None] - torch.arange(
            begin, last, device=query.device
        )
        mask = (distance >= 0) & (distance < window)  # (Q, K)
        visible = [c for c in range(len(starts)) if ends[c] > begin and rows.first_rows[c] < last]
        for c in range(visible[0], visible[-1] + 1, width) if visible else ():
            c_end = min(c + width, visible[-1] + 1)
            value = membership(starts[c:c_end], ends[c:c_end], begin, last, query)
            mass = fused_attention(query[:, first:last], key[:, begin:last], value, scaling, mask=mask)
            sums[:, c:c_end] += rows.weighted(mass[..., : c_end - c], first, c)


def row_weights(
    query: Tensor, key: Tensor, scaling: float, sliding_window: int | None, rows: range, first_key: int
) -> tuple[Tensor, Tensor]:
    """Attention weights of consecutive query rows on the keys from `first_key` to the last row, normalised over these.

    Args:
        query: (H, n, D).
        key: (Hkv, n, D).
        scaling: factor of the logits.
        sliding_window: tokens a query sees, itself included; None for all.
        rows: the query rows.
        first_key: first key, at or before the first row.

    Returns:
        (H, R, K) float32 weights, and (R, K) distances from row to key (negative for keys after the row).
    """
    columns = slice(first_key, rows.stop)
    queries = query[:, rows.start : rows.stop].float() * scaling  # (H, R, D)
    keys = key[:, columns].float()  # (Hkv, K, D)
    scores = queries.reshape(key.shape[0], -1, query.shape[-1]) @ keys.transpose(1, 2)  # (Hkv, H / Hkv · R, K)
    scores = scores.view(query.shape[0], len(rows), -1)
    position = torch.arange(first_key, rows.stop, device=query.device)
    distance = position[rows.start - first_key :, None] - position  # (R, K)
    hidden = distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    return scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1), distance


def received_attention(
    query: Tensor, key: Tensor, scaling: float, sliding_window: int | None, heads: list[int], first_row: int
) -> Tensor:
    """Attention that every token receives in the given heads from the rows `first_row` to the last, summed over rows.

    Returns:
        (len(heads), n) float32; each head sums to the number of rows.
    """
    length, group = query.shape[1], query.shape[0] // key.shape[0]
    query, key = query[heads], key[[head // group for head in heads]]
    received = torch.zeros(len(heads), length, dtype=torch.float32, device=query.device)
    size = max(1, SCORE_BUDGET // (len(heads) * length))
    for first in range(first_row, length, size):
        rows = range(first, min(first + size, length))
        weights, _ = row_weights(query, key, scaling, sliding_window, rows, 0)
        received[:, : rows.stop] += weights.sum(dim=1)
    return received
