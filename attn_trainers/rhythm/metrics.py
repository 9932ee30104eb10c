"""What Rhythm logs, under `rhythm/`: sums and counts per rank, which the trainer adds up over ranks.

Reference for random input with the default options: `mean_factor` 1.194, `dominated_share` 0.15, `intro_share` 0.13.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention.heads import HeadSets, jaccard
from ..base.ranks import Totals
from .credit import Credit


def mean_of_defined(values: Sequence[Tensor]) -> tuple[float, float]:
    """Sum and number of all values that are not NaN."""
    defined = [value[~value.isnan()].double() for value in values]
    return sum(value.sum().item() for value in defined), sum(value.numel() for value in defined)


def credit_totals(credits: Sequence[Credit], signals: Sequence[tuple[Tensor, Tensor]] | None) -> Totals:
    """Shares of all tokens, and means, over this rank's responses.

    - `amplified_share`, `mean_factor`: tokens with a factor above 1, and the mean factor, before the advantage's sign
      is looked at.
    - `dominated_share`, `intro_share`: |D|/n and |I(D)|/n under the scheme's selection, also where it does not use
      them; `waad_mean` in tokens and `fai_mean` in attention weights. Only with signals.

    Args:
        credits: one per response.
        signals: WAAD and FAI (n,) of each response, or `None` where the scheme reads no attention.
    """
    tokens = sum(len(one.factors) for one in credits)
    totals: Totals = {
        "amplified_share": (sum((one.factors > 1).sum().item() for one in credits), tokens),
        "mean_factor": (sum(one.factors.double().sum().item() for one in credits), tokens),
    }
    if signals is not None:
        totals["dominated_share"] = (sum(one.sets.dominated.sum().item() for one in credits), tokens)
        totals["intro_share"] = (sum(one.sets.intro.sum().item() for one in credits), tokens)
        totals["waad_mean"] = mean_of_defined([waad for waad, _ in signals])
        totals["fai_mean"] = mean_of_defined([fai for _, fai in signals])
    return totals


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
        "reward/correct": means[correct].mean().item(),
        "reward/wrong": means[~correct].mean().item(),
        "reward/correlation_correct": torch.corrcoef(torch.stack([means, correct.double()]))[0, 1].item(),
        "reward/correlation_length": torch.corrcoef(torch.stack([means, lengths]))[0, 1].item(),
        "reward/chunks_per_100_tokens": (100 * chunks.sum() / lengths.sum()).item(),
    }
