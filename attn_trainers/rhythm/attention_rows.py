"""Breadth and concentration of rows of the mean attention map over chosen heads, block by block."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .credit import anchor_tokens


ANCHOR_FRACTION = 0.1  # S, the anchors that concentration is measured on


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
            f"queries hold {queries[0].shape[1]} positions; give prompt_length + len(fai) = "
            f"{prompt_length + len(fai)}."
        )
    anchors = anchor_tokens(fai, ANCHOR_FRACTION)
    breadth, concentration = torch.empty(2, len(fai), dtype=torch.float32, device=queries[0].device)
    for rows, positions in attention_row_blocks(queries, keys, prompt_length, **blocks):
        breadth[positions - prompt_length] = row_breadth(rows, positions, sink_tokens)
        concentration[positions - prompt_length] = row_concentration(rows, positions, anchors, prompt_length)
    return breadth, concentration
