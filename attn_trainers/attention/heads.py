"""Heads of a model, and sets of them ranked by how far back they look (arXiv 2510.13554, sections 4.1 and 5.1)."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


Head = tuple[int, int]


class HeadSets(NamedTuple):
    """H_loc and H_glob, each (layer, query head) pairs ascending by mean backward span."""

    local_heads: list[Head]
    global_heads: list[Head]


def middle_layers(num_layers: int) -> list[int]:
    """Five evenly spaced layers of the middle third (section 5.1), both ends included; fewer in small models.

    Raises:
        ValueError: for less than one layer.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}: a model has at least one layer.")
    low, high = num_layers // 3, 2 * num_layers // 3
    return sorted({min(math.floor(low + (high - low) * i / 4 + 0.5), num_layers - 1) for i in range(5)})


def rank_heads(span: Tensor, heads: Sequence[Head], fraction: float = 0.3) -> tuple[list[Head], list[Head]]:
    """The `fraction` of heads with the shortest and with the longest mean backward span (section 4.1).

    Args:
        span: (C,) mean backward span.
        heads: the C heads, ascending; ties in span keep this order.
        fraction: share of the heads in each set, at least one head.

    Returns:
        Local heads and global heads, each ascending by span.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"head_fraction={fraction}: give a share above 0 and up to 1 (the paper uses 0.3).")
    order = torch.argsort(span, stable=True).tolist()
    count = max(1, math.floor(fraction * len(order) + 1e-9))
    return [heads[i] for i in order[:count]], [heads[i] for i in order[-count:]]


def jaccard(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """|A and B| / |A or B| of two sets, of content words (Table 1) or of heads; 1 for two empty sets."""
    first, second = set(first), set(second)
    return len(first & second) / len(first | second) if first or second else 1.0
