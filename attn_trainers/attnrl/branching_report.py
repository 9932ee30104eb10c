"""Does attention choose the branch points? What a sample of rollouts says, and which setting would help.

Influence is zero for the first step, for the last Δ and after the thinking. A short answer with few steps leaves
attention nothing to choose from: the earliest steps are branched, as `branching="first_steps"` would do without any
attention.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .exploration import choose_branch_points
from .steps import STEP_MODES


StepRanges = Sequence[tuple[int, int]]

_MOST_AGREEMENT = 0.8  # with `first_steps`; above, attention hardly has a say
_MOST_FALLBACKS = 0.5
_LEAST_INFLUENCE = 0.5  # share of steps


@dataclass(frozen=True)
class BranchingReport:
    """How a sample of rollouts is branched; shares lie in [0, 1] and are NaN where there is nothing to divide.

    Attributes:
        num_rollouts: rollouts looked at.
        steps_per_rollout: mean number of steps.
        influence_share: share of the steps with positive influence.
        fallback_share: share of the branch points that the criterion itself did not give.
        first_steps_agreement: share of the branch points that `first_steps` would choose too.
        mean_position: mean of the tokens before a branch point, in parts of its rollout.
        advice: which settings would help; empty where attention chooses.
    """

    num_rollouts: int
    steps_per_rollout: float
    influence_share: float
    fallback_share: float
    first_steps_agreement: float
    mean_position: float
    advice: str

    def __str__(self) -> str:
        found = (
            f"{self.num_rollouts} rollouts of {self.steps_per_rollout:.1f} steps, {self.influence_share:.0%} of them "
            f"with influence; of the branch points {self.fallback_share:.0%} are fallbacks and "
            f"{self.first_steps_agreement:.0%} those of branching='first_steps', at {self.mean_position:.2f} of the "
            "rollout on average."
        )
        return f"{found} {self.advice}".rstrip()


def report_branching(
    step_ranges: Sequence[StepRanges],
    influences: Sequence[Sequence[float] | np.ndarray],
    *,
    num_points: int,
    top_fraction: float = 0.2,
    min_spacing: int = 512,
    delta: int = 4,
    step_mode: str = "paragraphs",
    aggregation: str = "sum",
) -> BranchingReport:
    """Branch a sample of rollouts by attention and compare with `first_steps`.

    Args:
        step_ranges: per rollout, half-open token ranges of its steps, counted from the first completion token.
        influences: per rollout, (m,) influence of each step.
        num_points: branch points per rollout (N), at least 1.
        top_fraction: as in `select_branch_points`.
        min_spacing: as in `select_branch_points`, in tokens.
        delta: the setting `influence_delta`, in steps; the advice names it.
        step_mode: the setting; the advice names a finer one.
        aggregation: the setting `influence_aggregation`.

    Raises:
        ValueError: if a rollout's influence and ranges differ in number, or an option lies outside its range.
    """
    sample = list(zip(step_ranges, influences, strict=True))
    values = np.concatenate([np.asarray(influence, dtype=np.float64) for _, influence in sample] or [np.empty(0)])
    share = float((values > 0).mean()) if values.size else float("nan")
    spaced = _choices(sample, num_points, top_fraction, min_spacing)
    unspaced = _choices(sample, num_points, top_fraction, 0) if min_spacing else spaced
    return BranchingReport(
        num_rollouts=len(sample),
        steps_per_rollout=len(values) / len(sample) if sample else float("nan"),
        influence_share=share,
        fallback_share=spaced.fallbacks,
        first_steps_agreement=spaced.agreement,
        mean_position=spaced.position,
        advice=_advice(share, spaced, unspaced, min_spacing, delta, step_mode, aggregation),
    )


@dataclass(frozen=True)
class _Choices:
    """Shares over the branch points of a sample: fallbacks, those of `first_steps`, mean position."""

    fallbacks: float
    agreement: float
    position: float

    @property
    def poor(self) -> bool:
        return self.fallbacks > _MOST_FALLBACKS or self.agreement > _MOST_AGREEMENT


def _choices(sample: list, num_points: int, top_fraction: float, min_spacing: int) -> _Choices:
    count = fallbacks = agreed = 0
    position = 0.0
    for ranges, influence in sample:
        options = {"step_ranges": ranges, "num_points": num_points}
        chosen = choose_branch_points(
            "attention", influence=influence, top_fraction=top_fraction, min_spacing=min_spacing, **options
        )
        first = choose_branch_points("first_steps", **options)
        count += len(chosen.offsets)
        fallbacks += chosen.num_fallbacks
        agreed += (Counter(chosen.offsets) & Counter(first.offsets)).total()
        position += sum(offset / ranges[-1][1] for offset in chosen.offsets)
    if not count:
        return _Choices(*[float("nan")] * 3)
    return _Choices(fallbacks / count, agreed / count, position / count)


def _advice(
    share: float,
    spaced: _Choices,
    unspaced: _Choices,
    spacing: int,
    delta: int,
    step_mode: str,
    aggregation: str,
) -> str:
    if np.isnan(spaced.agreement):
        return f"No rollout has two steps, so none is branched{_finer(step_mode)}."
    if not spaced.poor:
        return ""
    advice = []
    # Without spacing more points are the criterion's own: then the distance is what keeps attention from choosing.
    if unspaced.fallbacks < spaced.fallbacks or unspaced.agreement < spaced.agreement:
        advice.append(
            f"min_branch_spacing={spacing} is too far for their length; set it to 0 and {unspaced.fallbacks:.0%} are "
            f"fallbacks, {unspaced.agreement:.0%} those of first_steps"
        )
    if unspaced.poor and share < _LEAST_INFLUENCE:
        advice.append(
            f"influence_delta={delta} leaves few of their steps with influence"
            + (_finer(step_mode) or "; set it to a lower number of steps")
        )
    elif unspaced.poor:
        advice.append(
            "the steps of most influence are the earliest; set "
            + ('influence_aggregation="mean"' if aggregation == "sum" else "branch_top_fraction lower")
        )
    return "Attention hardly chooses the branch points: " + ". Then ".join(advice) + "."


def _finer(step_mode: str) -> str:
    finer = STEP_MODES[STEP_MODES.index(step_mode) + 1 :]
    return "; set step_mode to " + " or ".join(f'"{mode}"' for mode in finer) if finer else ""
