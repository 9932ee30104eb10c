"""Where to branch, which rollouts to expand, which prompts to leave out, how many to draw (AttnRL, sections 3.1, 3.2).

All randomness comes from generators that the caller hands over.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..base.options import require_choice


# How the number of expanded rollouts is made whole.
ROUNDINGS = ("ceil", "round", "uniform")


@dataclass(frozen=True)
class BranchPoints:
    """Where one rollout is branched.

    Attributes:
        offsets: ascending; tokens of the rollout that are kept before each continuation, from 1 to its length - 1. An
            offset that is listed twice is branched twice.
        num_fallbacks: how many of them the criterion itself did not give.
    """

    offsets: list[int]
    num_fallbacks: int = 0


@dataclass(frozen=True)
class CriterionInput:
    """What a criterion chooses the branch points of one rollout by.

    Attributes:
        step_ranges: half-open token ranges of the m steps, counted from the first completion token.
        num_points: branch points wanted (N), at least 1.
        top_fraction, min_spacing: see `select_branch_points`.
        influence: (m,) influence of each step, where the criterion needs it.
        entropies: (n,) entropy at each token, where the criterion needs it.
        truth: (m,) how much each step is known to matter, where the criterion needs it.
        rng: source of all randomness, where the criterion needs it.
    """

    step_ranges: Sequence[tuple[int, int]]
    num_points: int
    top_fraction: float = 0.2
    min_spacing: int = 512
    influence: Sequence[float] | np.ndarray | None = None
    entropies: Sequence[float] | np.ndarray | None = None
    truth: Sequence[float] | None = None
    rng: random.Random | None = None

    @property
    def starts(self) -> list[int]:
        """Starts of all steps but the first: where a rollout can be branched between steps."""
        return [start for start, _ in self.step_ranges[1:]]


@dataclass(frozen=True)
class Criterion:
    """One way of choosing branch points.

    Attributes:
        choose: gives the points; where a rollout has no place to branch, none.
        needs: the field of `CriterionInput` that must be there, `None` for none. "influence" makes the trainer read
            the attention of initial rollouts, "entropies" their entropies, "truth" ask its `step_truth`.
    """

    choose: Callable[[CriterionInput], BranchPoints]
    needs: str | None = None


def choose_branch_points(criterion: str, **given) -> BranchPoints:
    """Choose the branch points of one rollout.

    A rollout of one step (one token for `entropy`) has no place to branch and gets no branch points.

    Args:
        criterion: `attention` (steps of top influence), `entropy` (tokens of top entropy, as in TreeRL), `random`
            (random steps), `first_steps` (the earliest), `oracle` (steps known to matter), or another entry of
            `CRITERIA`.
        given: fields of `CriterionInput`.

    Raises:
        ValueError: for an unknown criterion, a signal that it needs and did not get, or `num_points` below 1.
    """
    require_choice("criterion", criterion, tuple(CRITERIA))
    asked, chosen = CriterionInput(**given), CRITERIA[criterion]
    _check_num_points(asked.num_points)
    if chosen.needs is not None and getattr(asked, chosen.needs) is None:
        raise ValueError(f"{chosen.needs}=None; the criterion {criterion!r} needs {_NEEDS[chosen.needs]}.")
    return chosen.choose(asked)


def top_influence(asked: CriterionInput) -> BranchPoints:
    """AttnRL's own criterion, see `select_branch_points`."""
    return select_branch_points(
        asked.influence, asked.step_ranges, asked.num_points, asked.top_fraction, asked.min_spacing
    )


def top_entropy(asked: CriterionInput) -> BranchPoints:
    """TreeRL's criterion, see `select_entropy_points`."""
    return select_entropy_points(asked.entropies, asked.num_points)


def random_steps(asked: CriterionInput) -> BranchPoints:
    """Steps drawn at random, without repetition."""
    taken = asked.rng.sample(asked.starts, min(asked.num_points, len(asked.starts)))
    return fill_points(taken, asked.starts, asked.num_points)


def first_steps(asked: CriterionInput) -> BranchPoints:
    """The earliest steps."""
    return fill_points(asked.starts[: asked.num_points], asked.starts, asked.num_points)


def true_steps(asked: CriterionInput) -> BranchPoints:
    """The steps that are known to matter most, the first step excepted; ties are drawn at random, 0 is never taken."""
    if len(asked.truth) != len(asked.step_ranges):
        raise ValueError(f"truth has {len(asked.truth)} entries for {len(asked.step_ranges)} steps; give one a step.")
    known = [(value, start) for value, start in zip(asked.truth[1:], asked.starts, strict=True) if value > 0]
    order = (asked.rng or random.Random(0)).sample(known, len(known))
    order.sort(key=lambda pair: -pair[0])  # stable: ties stay in drawn order
    return fill_points([start for _, start in order[: asked.num_points]], asked.starts, asked.num_points)


# Where rollouts are branched, by the name that `AttnRLConfig.branching` takes.
CRITERIA = {
    "attention": Criterion(top_influence, needs="influence"),
    "entropy": Criterion(top_entropy, needs="entropies"),
    "random": Criterion(random_steps, needs="rng"),
    "first_steps": Criterion(first_steps),
    "oracle": Criterion(true_steps, needs="truth"),
}
_NEEDS = {
    "influence": "the influence of each step",
    "entropies": "the entropy of each token",
    "rng": "a random.Random",
    "truth": "how much each step is known to matter",
}


def select_branch_points(
    influence: Sequence[float] | np.ndarray,
    step_ranges: Sequence[tuple[int, int]],
    num_points: int,
    top_fraction: float = 0.2,
    min_spacing: int = 512,
) -> BranchPoints:
    """Attention-based branching (eq. 7): the earliest steps among those of top influence, with distance between them.

    1. θ is the (1 - top_fraction)-quantile of the influence over all steps, linearly interpolated; if θ = 0 and some
       influence is positive, the least positive influence.
    2. Candidates are the steps with influence ≥ θ in their order, the first step excepted. One is taken if it starts
       at least `min_spacing` tokens after the completion's start and after the end of every step taken before.
    3. Where that gives too few, the earliest steps not yet taken follow, whatever their distance; then the same
       offsets once more, so that the leaf budget holds.

    The step itself is sampled anew: everything before it is kept.

    Args:
        influence: (m,) y of each step.
        step_ranges: half-open token ranges of the m steps, counted from the first completion token.
        num_points: branch points wanted (N), at least 1.
        top_fraction: share of steps that are candidates (ρ).
        min_spacing: tokens; 0 for no spacing. It counts completion tokens.

    Raises:
        ValueError: if influence and ranges differ in number, or for an option outside its range.
    """
    _check_num_points(num_points)
    if not 0.0 < top_fraction <= 1.0:
        raise ValueError(f"top_fraction={top_fraction} must lie in (0, 1]; published: 0.2.")
    values = np.asarray(influence, dtype=np.float64)  # (m,)
    if len(values) != len(step_ranges):
        raise ValueError(f"influence has {len(values)} entries for {len(step_ranges)} steps; they must be as many.")
    if len(values) < 2:
        return BranchPoints([])
    # Rounded, as 1 - 0.7 = 0.30000000000000004 would exclude a step that lies on the quantile itself.
    threshold = np.quantile(values, round(1.0 - top_fraction, 12))
    if threshold == 0 and (values > 0).any():
        threshold = values[values > 0].min()
    taken: list[int] = []
    ends: list[int] = []
    for step in range(1, len(values)):
        start, end = step_ranges[step]
        spaced = start >= min_spacing and all(start - other >= min_spacing for other in ends)
        if values[step] >= threshold and spaced:
            taken.append(start)
            ends.append(end)
        if len(taken) == num_points:
            break
    return fill_points(taken, [start for start, _ in step_ranges[1:]], num_points)


def select_entropy_points(entropies: Sequence[float] | np.ndarray, num_points: int) -> BranchPoints:
    """TreeRL's branching: before the tokens of highest entropy, the first token excepted; ties go to the earlier one.

    Args:
        entropies: (n,) entropy of the distribution each real completion token was drawn from.
        num_points: branch points wanted, at least 1.

    Raises:
        ValueError: for `num_points` below 1.
    """
    _check_num_points(num_points)
    values = np.asarray(entropies, dtype=np.float64)  # (n,)
    if len(values) < 2:
        return BranchPoints([])
    top = 1 + np.argsort(-values[1:], kind="stable")[:num_points]
    return fill_points([int(offset) for offset in top], list(range(1, len(values))), num_points)


def _check_num_points(num_points: int) -> None:
    if num_points < 1:
        raise ValueError(
            f"num_points={num_points} asks for no branch point; set it to at least 1, or expand no rollout."
        )


def fill_points(taken: Sequence[int], offsets: Sequence[int], num_points: int) -> BranchPoints:
    """Fill up to `num_points`: earliest offsets not taken yet, then all over again; none where there is no offset."""
    if not offsets:
        return BranchPoints([])
    chosen = list(taken)
    used = set(chosen)
    for offset in offsets:
        if len(chosen) >= num_points:
            break
        if offset not in used:
            chosen.append(offset)
    for repeat in range(num_points - len(chosen)):
        chosen.append(offsets[repeat % len(offsets)])
    return BranchPoints(sorted(chosen), num_fallbacks=len(chosen) - len(taken))


@dataclass
class RunningMean:
    """Cumulative arithmetic mean."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """NaN before the first value."""
        return self.total / self.count if self.count else float("nan")

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.count = state["total"], state["count"]


def filter_easy_prompts(
    accuracies: Sequence[float], mean_influences: Sequence[float], easy_mean: RunningMean
) -> list[bool]:
    """Attention-based filter of easy prompts (eq. 8): which prompts to keep.

    The mean over all prompts solved so far is updated with the solved ones of this batch; then a solved prompt is kept
    only if its own mean influence ȳ lies above it. Others are always kept.

    Args:
        accuracies: share of correct initial rollouts of each prompt.
        mean_influences: ȳ of each prompt.
        easy_mean: μ_easy; updated.
    """
    for accuracy, influence in zip(accuracies, mean_influences, strict=True):
        if accuracy == 1.0:
            easy_mean.update(influence)
    return [
        accuracy < 1.0 or influence > easy_mean.mean
        for accuracy, influence in zip(accuracies, mean_influences, strict=True)
    ]


def num_expanded(num_correct: int, num_rollouts: int, rounding: str = "ceil") -> int:
    """Number of rollouts to expand, M = exp(-z) · G made whole, with z the accuracy (eq. 9).

    Args:
        num_correct: correct rollouts.
        num_rollouts: G.
        rounding: `ceil` (the released runs), `round` (the paper, halves up), or `uniform` (always G).

    Raises:
        ValueError: for an unknown rounding, no rollouts, or more correct rollouts than rollouts.
    """
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts={num_rollouts} leaves nothing to expand; it must be at least 1.")
    if not 0 <= num_correct <= num_rollouts:
        raise ValueError(f"num_correct={num_correct} must lie from 0 to num_rollouts={num_rollouts}.")
    if rounding == "uniform":
        return num_rollouts
    exact = math.exp(-num_correct / num_rollouts) * num_rollouts
    if rounding == "ceil":
        return math.ceil(exact)
    if rounding == "round":
        return math.floor(exact + 0.5)
    raise ValueError(f"rounding={rounding!r} is unknown; use ceil, round or uniform.")


def choose_expanded(correct: Sequence[bool], rounding: str, rng: random.Random) -> list[int]:
    """Which rollouts of a prompt to expand: the whole minority class and random others up to M; ascending indices.

    At accuracy one half the wrong ones count as the minority. Of prompts whose rollouts are all right (or all wrong)
    the first M are expanded.
    """
    right = [i for i, c in enumerate(correct) if c]
    wrong = [i for i, c in enumerate(correct) if not c]
    count = num_expanded(len(right), len(correct), rounding)
    if not right or not wrong:
        return list(range(count))
    minority, majority = (wrong, right) if len(right) >= len(wrong) else (right, wrong)
    others = rng.sample(majority, min(len(majority), max(0, count - len(minority))))
    return sorted(minority + others)


class PromptBatchController:
    """Draws as many prompts as fill a training batch with rows that carry signal (eq. 10).

    B_{m+1} = λ B_m + (1 - λ) B' B_i / B''_i, rounded to draw prompts, where B' is the wanted number of rows and B''_i
    the rows that prompt batch i, the last one trained, gave for its B_i prompts.

    Args:
        target_rows: B'.
        size: first prompt batch.
        smoothing: λ.
        rounding: `round` (the paper, halves up) or `ceil` (the released runs).
        max_change: bound of the target, in multiples of B_m and of 1 / B_m; also the answer to a batch without signal.
        max_size: bound of B; `None` for none.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        target_rows: int,
        size: int,
        smoothing: float = 0.9,
        rounding: str = "round",
        max_change: float = 2.0,
        max_size: int | None = None,
    ):
        if size < 1:
            raise ValueError(f"size={size} draws no prompts; it must be at least 1.")
        if rounding not in ("round", "ceil"):
            raise ValueError(f"rounding={rounding!r} is unknown; use round or ceil.")
        if target_rows < 1:
            raise ValueError(f"target_rows={target_rows} wants no rows; it must be at least 1.")
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"smoothing={smoothing} must lie in [0, 1]; published: 0.9.")
        if max_change < 1.0:
            raise ValueError(f"max_change={max_change} must be at least 1, which holds the prompt batch constant.")
        if max_size is not None and max_size < size:
            raise ValueError(f"max_size={max_size} is below size={size}; raise max_size or start with fewer prompts.")
        self.target_rows, self.smoothing, self.rounding = target_rows, smoothing, rounding
        self.max_change, self.max_size = max_change, max_size
        # Kept unrounded: steps of less than half a prompt, as λ makes them for small batches, must add up.
        self._exact = float(size)

    @property
    def size(self) -> int:
        """Prompts to draw next."""
        # Products of floats are not exact: 0.9 · 64 + 0.1 · 64 must not count as above 64.
        exact = round(self._exact, 9)
        return max(1, math.ceil(exact) if self.rounding == "ceil" else math.floor(exact + 0.5))

    def update(self, prompts_drawn: int, rows_with_signal: int) -> int:
        """Set the next prompt batch by the yield of a trained one, and return it.

        Args:
            prompts_drawn: B_i.
            rows_with_signal: B''_i.
        """
        most, least = self._exact * self.max_change, self._exact / self.max_change
        target = self.target_rows * prompts_drawn / rows_with_signal if rows_with_signal else most
        target = min(max(target, least), most)
        exact = self.smoothing * self._exact + (1.0 - self.smoothing) * target
        self._exact = min(exact, self.max_size or exact)
        return self.size

    def state_dict(self) -> dict[str, float]:
        return {"exact_size": self._exact}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._exact = state["exact_size"]
