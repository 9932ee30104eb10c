"""What trees say of a branching criterion. Pure functions; the unit is the prompt, intervals come from resampling
prompts, each with all its trees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pvariance

import numpy as np

from ..evaluation.statistics import resampled_means


Sums = tuple[Sequence[float], Sequence[float]]  # per prompt: numerators and denominators of a ratio


@dataclass(frozen=True)
class Tree:
    """A rollout and the continuations at its branch points. Its leaves are the rollout and all continuations.

    Attributes:
        prompt: index of the prompt.
        correct: 1.0 or 0.0, of the rollout.
        num_tokens: of the rollout.
        offsets: its branch points; none where it has no place to branch.
        num_fallbacks: how many of them the criterion itself did not give.
        num_agreeing: how many of them `first_steps` would choose too.
        rewards: 1.0 or 0.0 of each continuation.
        continuation_tokens: sampled tokens of each continuation.
    """

    prompt: int
    correct: float
    num_tokens: int
    offsets: list[int]
    num_fallbacks: int
    num_agreeing: int
    rewards: list[float]
    continuation_tokens: list[int]

    @property
    def leaves(self) -> list[float]:
        return [self.correct, *self.rewards]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def outcome(rewards: Sequence[float]) -> str:
    """ "right", "wrong" or "mixed": all leaves right, all wrong, or both kinds."""
    return "right" if min(rewards) == 1 else "wrong" if max(rewards) == 0 else "mixed"


def _share_of_trees(kind: str) -> Callable:
    return lambda trees: (sum(outcome(tree.leaves) == kind for tree in trees), len(trees))


def _is_prompt(kind: str) -> Callable:
    return lambda trees: (outcome([leaf for tree in trees for leaf in tree.leaves]) == kind, 1)


def _points(value: Callable[[Tree], float]) -> Callable:
    return lambda trees: (sum(value(tree) for tree in trees), sum(len(tree.offsets) for tree in trees))


def _broken(trees: Sequence[Tree]) -> tuple[float, float]:
    solved = all(tree.correct == 1 for tree in trees)
    return solved and any(0 in tree.rewards for tree in trees), solved


def _variance(trees: Sequence[Tree]) -> tuple[float, float]:
    branched = [tree for tree in trees if len(tree.rewards) > 1]  # one value has no variance
    return sum(pvariance(tree.rewards) for tree in branched), len(branched)


def _tokens_per_mixed_tree(trees: Sequence[Tree]) -> tuple[float, float]:
    tokens = sum(tree.num_tokens + sum(tree.continuation_tokens) for tree in trees)
    return tokens, sum(outcome(tree.leaves) == "mixed" for tree in trees)


# Each is a ratio of sums over prompts: given the trees of a prompt, what it adds to both.
MEASURES: dict[str, Callable[[Sequence[Tree]], tuple[float, float]]] = {
    "position": _points(lambda tree: sum(offset / tree.num_tokens for offset in tree.offsets)),
    "fallbacks": _points(lambda tree: tree.num_fallbacks),
    "agreement": _points(lambda tree: tree.num_agreeing),
    "trees_right": _share_of_trees("right"),
    "trees_mixed": _share_of_trees("mixed"),
    "trees_wrong": _share_of_trees("wrong"),
    "prompts_right": _is_prompt("right"),
    "prompts_mixed": _is_prompt("mixed"),
    "prompts_wrong": _is_prompt("wrong"),
    "solved_broken": _broken,
    "variance": _variance,
    "tokens_per_mixed_tree": _tokens_per_mixed_tree,
}


def sums_of(trees: Sequence[Tree], measure: str) -> Sums:
    """Per prompt, in order of its index, what its trees add to numerator and denominator of a measure."""
    groups: dict[int, list[Tree]] = {}
    for tree in trees:
        groups.setdefault(tree.prompt, []).append(tree)
    pairs = [MEASURES[measure](groups[prompt]) for prompt in sorted(groups)]
    return [float(top) for top, _ in pairs], [float(bottom) for _, bottom in pairs]


def ratio(sums: Sums, seed: int = 0) -> Interval:
    """Ratio of the sums over prompts with its interval.

    A resample without a denominator counts as infinite where it has a numerator, and is left out where it has none.
    """
    return _interval(_divide(*map(np.sum, sums)), _resampled(sums, seed))


def ratio_difference(first: Sums, second: Sums, seed: int = 0) -> Interval:
    """Ratio of the first minus ratio of the second, over the same prompts; a resample takes the same from both.

    Raises:
        ValueError: if they have different numbers of prompts.
    """
    if len(first[0]) != len(second[0]):
        raise ValueError(f"first has {len(first[0])} prompts and second {len(second[0])}; give the same prompts.")
    with np.errstate(invalid="ignore"):
        draws = _resampled(first, seed) - _resampled(second, seed)
        value = _divide(*map(np.sum, first)) - _divide(*map(np.sum, second))
    return _interval(value, draws)


def _divide(top, bottom):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(top, bottom)


def _resampled(sums: Sums, seed: int) -> np.ndarray:
    """(draws,) ratios; equal seeds and numbers of prompts give equal resamples."""
    return _divide(*(resampled_means(part, seed) for part in sums))


def _interval(value: float, draws: np.ndarray) -> Interval:
    if np.isnan(draws).all():
        return Interval(float(value), float("nan"), float("nan"))
    # Nearest: an interpolation between a number and infinity has no value.
    low, high = np.nanquantile(draws, [0.025, 0.975], method="nearest")
    return Interval(float(value), float(low), float(high))


def summarise(trees: Sequence[Tree], seed: int = 0) -> dict[str, Interval]:
    """Every measure of one criterion's trees."""
    return {name: ratio(sums_of(trees, name), seed) for name in MEASURES}


def prompts_needed(difference: Interval, num_prompts: int, size: float) -> int:
    """Prompts with which a difference of `size` would lie outside the interval of none, by its half-width now."""
    half = (difference.high - difference.low) / 2
    # Rounded, as floats that should be whole are not: a prompt more would be asked for.
    return int(np.ceil(round(num_prompts * (half / size) ** 2, 9)))
