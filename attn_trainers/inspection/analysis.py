"""Statistics of the preplan-and-anchor rhythm (arXiv 2510.13554v2, sections 3 and 4, Tables 1 and 2, appendix A).

The paper defines neither a peak nor the receiver heads' threshold; the rules here are named in each docstring, and
every coupling comes with the densities of the peaks it is measured on, since its chance level depends on them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.rhythm import peaks


@dataclass(frozen=True)
class Coupling:
    """A quantity at peaks against its chance level.

    Attributes:
        observed: mean entropy in nats, or share of peaks from 0 to 1; NaN without peaks.
        random: the same over all tokens, which is what randomly placed peaks give on average.
        densities: share of tokens that are peaks, per signal.
    """

    observed: float
    random: float
    densities: dict[str, float]

    @property
    def lift(self) -> float:
        return lift(self.observed, self.random)


def lift(observed: float, random: float) -> float:
    """(observed - random) / random, the paper's measure of a coupling; NaN where random is 0."""
    return (observed - random) / random if random else math.nan


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if len(values) else math.nan


def entropy_at_waad_peaks(entropies: Tensor, waad: Tensor, fraction: float = 0.3) -> Coupling:
    """Mean token entropy at WAAD peaks against all response tokens; both (n,). Table 2, first statistic."""
    at = peaks(waad, fraction)
    return Coupling(_mean(entropies[at]), _mean(entropies), {"waad": _mean(at)})


def receiver_peaks_at_global_peaks(receiver_fai: Tensor, global_fai: Tensor, fraction: float = 0.3) -> Coupling:
    """Share of receiver-FAI peaks that are global-FAI peaks, against the density of the latter; both (n,).

    Table 2, second statistic. Densities and chance are taken over the tokens where both are defined.
    """
    defined = ~(receiver_fai.isnan() | global_fai.isnan())
    receiver, anchors = peaks(receiver_fai, fraction), peaks(global_fai, fraction)
    densities = {"receiver_fai": _mean(receiver[defined]), "global_fai": _mean(anchors[defined])}
    return Coupling(_mean(anchors[receiver & defined]), densities["global_fai"], densities)


def fai_peaks_after_waad_peaks(fai: Tensor, waad: Tensor, fraction: float = 0.3) -> Coupling:
    """Share of FAI peaks at or one token after a WAAD peak, against shuffled FAI peaks; both (n,).

    Table 2, third statistic. The mean over all shuffles is exact: the share of tokens with a defined FAI that are
    at or one after a WAAD peak.
    """
    defined = ~fai.isnan()
    anchors, planning = peaks(fai, fraction), peaks(waad, fraction)
    near = planning.clone()
    near[1:] |= planning[:-1]
    densities = {"fai": _mean(anchors[defined]), "waad": _mean(planning)}
    return Coupling(_mean(near[anchors]), _mean(near[defined]), densities)


def column_kurtosis(column_means: Tensor) -> Tensor:
    """Excess kurtosis (heads,) of each head's mean received attention over positions (heads, n), NaN ones left out.

    A head that sends all attention to few columns is sharply peaked: the receiver heads of Bogdan et al. 2025. 0 for a
    normal distribution; NaN where a head's columns are all equal.
    """
    columns = column_means.double()
    centred = columns - columns.nanmean(1, keepdim=True)
    return (centred**4).nanmean(1) / (centred**2).nanmean(1) ** 2 - 3.0


def receiver_heads(column_means: Sequence[Tensor], fraction: float = 0.3) -> list[int]:
    """Heads with the highest mean column kurtosis over responses, highest first, ties to the lower index.

    Args:
        column_means: per response (heads, n_i).
        fraction: share of heads to keep (the paper gives none), at least one head.

    Raises:
        ValueError: without responses.
    """
    if not column_means:
        raise ValueError("column_means=[] has no response; give the (heads, n) column means of one or more.")
    kurtosis = torch.stack([column_kurtosis(columns) for columns in column_means]).nanmean(0)  # (heads,)
    order = torch.argsort(kurtosis.nan_to_num(nan=-math.inf), descending=True, stable=True)
    return order[: max(1, math.floor(fraction * len(kurtosis)))].tolist()


def peak_average(values: Iterable[float], weight: float) -> list[float]:
    """The paper's curve smoothing, EMA_t = a max(x_t, EMA_{t-1}) + (1 - a) EMA_{t-1}, from EMA_0 = x_0 (appendix A.2).

    It never falls, so it flatters a run that collapses: show raw values beside it.
    """
    averages: list[float] = []
    for value in values:
        previous = averages[-1] if averages else value
        averages.append(weight * max(value, previous) + (1.0 - weight) * previous)
    return averages
