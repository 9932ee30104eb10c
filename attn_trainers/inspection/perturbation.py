"""Do other words follow when a token that is much attended to is replaced? (arXiv 2510.13554v2, Table 1, equation 11)

At a few positions of a response the likeliest other tokens are forced one at a time, the response is continued
greedily from there, and the content words behind the position are compared with those of the response itself: the less
they overlap, the more was decided at that position. The paper compares positions of high and of low FAI and gives
neither their number nor that of the tokens, nor the stop list: those are choices here. What has no model in it is in
this module; the continuations are made in `attn_trainers.inspection.continuations`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ..evaluation.statistics import Comparison, paired_bootstrap


# English function words: what stays when they and punctuation are gone says what a text is about.
_FUNCTION_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between both but
by can could did do does doing down during each either few for from further had has have having he her here hers
herself him himself his how i if in into is it its itself just let may me might more most must my myself neither no nor
not now of off on once only or other our ours ourselves out over own same shall she should so some such than that the
their theirs them themselves then there these they this those through thus to too under until up upon us very was we
were what when where whether which while who whom whose why will with within without would yet you your yours yourself
yourselves
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:'[^\W_]+)?")  # numbers with separators are one word


@dataclass(frozen=True)
class Perturbation:
    """One position of a response, and what other tokens there lead to.

    Attributes:
        position: of the replaced token in the response, from 0.
        top: whether it is one of the highest in FAI; else it is one of the lowest.
        fai: its FAI, an attention weight from 0 to 1.
        token: text of the replaced token.
        forced: texts of the tokens put in its place.
        jaccards: per forced token, overlap of the content words behind it with those of the response, from 0 to 1.
    """

    position: int
    top: bool
    fai: float
    token: str
    forced: list[str]
    jaccards: list[float]


@dataclass(frozen=True)
class PerturbedResponse:
    """The perturbations of one response of `num_tokens` tokens; none where it is too short."""

    num_tokens: int
    perturbations: list[Perturbation]

    def mean_jaccard(self, top: bool) -> float:
        """Mean over forced tokens, then over the top or bottom positions; NaN without positions."""
        means = [fmean(p.jaccards) for p in self.perturbations if p.top == top]
        return fmean(means) if means else math.nan

    def mean_place(self, top: bool) -> float:
        """Mean of position / num_tokens over the top or bottom positions; NaN without positions."""
        places = [p.position / self.num_tokens for p in self.perturbations if p.top == top]
        return fmean(places) if places else math.nan


@dataclass(frozen=True)
class PerturbationSummary:
    """Table 1 of the paper over several responses, each weighing the same.

    Attributes:
        responses: those with positions to compare.
        left_out: those without, too short.
        continuations: forced tokens altogether.
        comparison: mean Jaccard at top positions (`first`) and bottom ones (`second`), their difference, and its 95 %
            interval by resampling responses; None without responses.
        below: responses in which the top positions' mean lies below that of the bottom ones.
        places: mean position of the top and of the bottom positions as a share of the response; None without
            responses. The later a position, the fewer words are left to differ: the two should be alike before the
            difference is ascribed to FAI.
    """

    responses: int
    left_out: int
    continuations: int
    comparison: Comparison | None
    below: int
    places: tuple[float, float] | None

    @property
    def share_below(self) -> float:
        """Pr(top < bottom) over responses; NaN without any."""
        return self.below / self.responses if self.responses else math.nan


def content_words(text: str) -> set[str]:
    """Words and numbers of a text in lower case, without punctuation and English stop words.

    What follows an apostrophe is cut off, and a negated verb ("don't") is a stop word. A text that puts no spaces
    between words is one word up to its next punctuation mark.
    """
    words = set()
    for word in _WORD.findall(text.lower().replace("’", "'")):
        stem, _, ending = word.partition("'")
        if stem not in STOP_WORDS and ending != "t":
            words.add(stem)
    return words


def choose_positions(fai: Tensor, eligible: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Positions of the highest and of the lowest FAI.

    Args:
        fai: (n,), NaN where undefined.
        eligible: (n,) mask of the positions to choose from; undefined FAI is never chosen.
        count: positions in each set; fewer where not twice as many are eligible, so that the sets stay apart.

    Returns:
        Top positions, highest FAI first, and bottom positions, lowest first; of equals the earlier ranks higher.
    """
    defined = (eligible & ~fai.isnan()).nonzero().flatten()
    order = defined[torch.argsort(fai[defined], descending=True, stable=True)].tolist()
    kept = min(count, len(order) // 2)
    return order[:kept], order[::-1][:kept]


def summarise_perturbations(perturbed: Sequence[PerturbedResponse], seed: int = 0) -> PerturbationSummary:
    """Mean overlap at top and bottom positions, how often the top one is lower, and the interval of the difference.

    Args:
        perturbed: the responses; those without positions are counted and left out.
        seed: of the bootstrap.
    """
    usable = [response for response in perturbed if response.perturbations]
    left_out = len(perturbed) - len(usable)
    if not usable:
        return PerturbationSummary(0, left_out, 0, None, 0, None)
    top, bottom = ([response.mean_jaccard(is_top) for response in usable] for is_top in (True, False))
    return PerturbationSummary(
        responses=len(usable),
        left_out=left_out,
        continuations=sum(len(p.forced) for response in usable for p in response.perturbations),
        comparison=paired_bootstrap(top, bottom, seed),
        below=sum(a < b for a, b in zip(top, bottom, strict=True)),
        places=(fmean(r.mean_place(True) for r in usable), fmean(r.mean_place(False) for r in usable)),
    )
