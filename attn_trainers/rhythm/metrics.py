"""What Rhythm logs, under `rhythm/`: sums and counts per rank, which the trainer adds up over ranks.

Reference for random input with the default options: `mean_factor` 1.194, `dominated_share` 0.15, `intro_share` 0.13.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.heads import HeadSets, jaccard
from .credit import CreditOptions, credit_sets


Totals = dict[str, tuple[float, float]]


def mean_of_defined(values: Sequence[Tensor]) -> tuple[float, float]:
    """Sum and number of all values that are not NaN."""
    defined = [value[~value.isnan()].double() for value in values]
    return sum(value.sum().item() for value in defined), sum(value.numel() for value in defined)


def factor_totals(factors: Sequence[Tensor]) -> Totals:
    """Share of tokens with a factor above 1 and mean factor, before the advantage's sign is looked at."""
    tokens = sum(len(row) for row in factors)
    return {
        "amplified_share": (sum((row > 1).sum().item() for row in factors), tokens),
        "mean_factor": (sum(row.double().sum().item() for row in factors), tokens),
    }


def set_totals(
    signals: Sequence[tuple[Tensor, Tensor]],
    factors: Sequence[Tensor],
    eligible: Sequence[Tensor | None],
    scheme: str,
    options: CreditOptions,
) -> Totals:
    """|D|/n and |I(D)|/n over all tokens, and the means of WAAD (tokens) and FAI (attention weights)."""
    totals = {"dominated_share": 0.0, "intro_share": 0.0}
    tokens = 0
    for (waad, fai), row, words in zip(signals, factors, eligible, strict=True):
        if len(row):
            shares = credit_metrics(waad, fai, row, scheme, eligible=words, **vars(options))
            tokens += len(row)
            for name in totals:
                totals[name] += shares[name] * len(row)
    return {
        **{name: (total, tokens) for name, total in totals.items()},
        "waad_mean": mean_of_defined([waad for waad, _ in signals]),
        "fai_mean": mean_of_defined([fai for _, fai in signals]),
    }


def head_overlap(heads: HeadSets, previous: HeadSets | None) -> dict[str, float]:
    """Jaccard index of the local and the global set with those of the step before."""
    if previous is None:
        return {}
    return {
        "head_jaccard/local": jaccard(heads.local_heads, previous.local_heads),
        "head_jaccard/global": jaccard(heads.global_heads, previous.global_heads),
    }


def measure_totals(measures: Sequence[tuple[Tensor, Tensor] | None], fai: Sequence[Tensor]) -> Totals:
    """Mean breadth and level of FAI in the rhythm reward's heads: a drift means that the reward is being gamed."""
    breadth = [measure[0] for measure in measures if measure is not None]
    return {"reward/breadth_mean": mean_of_defined(breadth), "reward/fai_mean": mean_of_defined(fai)}


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


def credit_metrics(
    waad: Tensor,
    fai: Tensor,
    factors: Tensor,
    scheme: str = "coupled",
    *,
    eligible: Tensor | None = None,
    **options,
) -> dict[str, float]:
    """What to watch of one response's credit: shares of its n tokens and the mean factor.

    `dominated_share` and `intro_share` are |D|/n and |I(D)|/n under the scheme's selection, also where it does not use
    them. On independent noise with the default options: mean factor 1.194 (coupled), |D|/n 0.15, |I(D)|/n 0.13.

    Raises:
        ValueError: for an empty response.
    """
    if len(factors) == 0:
        raise ValueError("factors has shape (0,): leave empty responses out of the metrics")
    settings, largest = CreditOptions.from_keywords(options), not scheme.endswith("_bottom")
    sets = credit_sets(waad, fai, settings, largest=largest, eligible=eligible)
    return {
        "amplified_share": (factors > 1).double().mean().item(),
        "mean_factor": factors.double().mean().item(),
        "dominated_share": sets.dominated.double().mean().item(),
        "intro_share": sets.intro.double().mean().item(),
    }
