"""Rank correlation of a signal with a truth among steps that stand at the same place: position can win nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attnpo.discovery.bootstrap import interval_ends, resampled_counts


def centred_ranks(values: Tensor, strata: Tensor) -> Tensor:
    """Ranks within each stratum, divided by its size and centred at 0, ties at their middle rank.

    Args:
        values: (..., N).
        strata: (N,) long, which entries are ranked together.

    Returns:
        (..., N) float64 in (-0.5, 0.5).
    """
    ranks = torch.zeros(values.shape, dtype=torch.float64)
    for stratum in strata.unique():
        own = strata == stratum
        part = values[..., own]
        below = (part[..., :, None] > part[..., None, :]).sum(-1) - (part[..., :, None] < part[..., None, :]).sum(-1)
        ranks[..., own] = below.double() / (2 * own.sum())
    return ranks


@dataclass
class MatchedCorrelation:
    """Correlation of centred ranks, of M signals with one truth.

    Attributes:
        values: (M,) in [-1, 1]; NaN where signal or truth never differs within a place.
        lower, upper: (M,) ends of its bootstrap interval over problems (95 %).
    """

    values: Tensor
    lower: Tensor
    upper: Tensor


def matched_correlation(
    signals: Sequence[Tensor], truths: Sequence[Tensor], samples: int = 1000, seed: int = 0
) -> MatchedCorrelation:
    """Correlate signals with a truth over solutions, one per problem; steps with equally many after them are compared.

    Args:
        signals: per solution (M, S).
        truths: per solution (S,).
        samples: bootstrap samples of problems; the ranks are those of all solutions.
        seed: of them.
    """
    problems = torch.repeat_interleave(torch.tensor([len(truth) for truth in truths]))  # (N,)
    places = torch.cat([torch.arange(len(truth), 0, -1) for truth in truths])
    signal = centred_ranks(torch.cat(list(signals), dim=1), places)  # (M, N)
    truth = centred_ranks(torch.cat(list(truths))[None], places)  # (1, N)
    products = torch.stack([signal * truth, signal.square(), truth.square().expand_as(signal)])  # (3, M, N)
    sums = torch.zeros(3, len(signal), len(truths), dtype=torch.float64).index_add_(2, problems, products)

    def correlate(weights: Tensor) -> Tensor:  # (samples, problems) to (samples, M)
        both, own, others = (weights @ part.T for part in sums)
        return both / (own * others).sqrt()

    counts = resampled_counts(torch.arange(len(truths)), samples, torch.Generator().manual_seed(seed))
    lower, upper = interval_ends(correlate(counts))
    return MatchedCorrelation(correlate(torch.ones(1, len(truths), dtype=torch.float64))[0], lower, upper)
