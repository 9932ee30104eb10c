"""Steps with wrong numbers: which are chosen, how they are corrupted, how the answers fare (AttnRL, figure 3)."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .measure import RolloutSignals
from .statistics import Interval, ratio


NUM_POSITION_BINS = 5
KINDS = ("influence", "entropy", "rest")
_NUMBER = re.compile(r"\d+")
_UNDEFINED = Interval(*[float("nan")] * 3)


@dataclass(frozen=True)
class StepKind:
    """A step that may be corrupted.

    Attributes:
        step: its index.
        influential: whether it is among the top steps by influence.
        uncertain: whether it is among the top steps by the mean entropy of its tokens.
        position: tokens before it, in parts of the rollout.
    """

    step: int
    influential: bool
    uncertain: bool
    position: float


@dataclass(frozen=True)
class Disruption:
    """A corrupted step and whether the answer after it was right."""

    prompt: int
    kind: StepKind
    correct: float


def corrupt_numbers(text: str, rng: random.Random) -> str:
    """The text with other digits in place of its numbers: each number becomes another of as many digits, the same one
    at each of its places; a number without a leading zero gets none. A text without a number stays as it is."""
    changed: dict[str, str] = {}

    def other(match: re.Match) -> str:
        number = match[0]
        while changed.get(number, number) == number:
            first = "123456789" if number[0] != "0" else "0123456789"
            digits = [rng.choice(first), *(rng.choice("0123456789") for _ in number[1:])]
            changed[number] = "".join(digits)
        return changed[number]

    return _NUMBER.sub(other, text)


def top_steps(values: Sequence[float], fraction: float) -> set[int]:
    """Steps with a positive value in the top fraction, as branch candidates are told; the first step is none of them.

    Args:
        values: (m,) one per step.
        fraction: share of the steps (ρ).
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return set()
    threshold = np.quantile(values, round(1.0 - fraction, 12))
    return {k for k in range(1, len(values)) if values[k] > 0 and values[k] >= threshold}


def choose_steps(
    signals: RolloutSignals, eligible: Sequence[bool], fraction: float, count: int, rng: random.Random
) -> list[StepKind]:
    """The steps of a rollout that are corrupted: those of top influence or entropy first, then others at random.

    The first step, before which nothing stands, and the last, after which nothing follows, are never chosen.

    Args:
        signals: of the rollout.
        eligible: (m,) whether a step has a number.
        fraction: share of the steps that counts as top.
        count: steps at most.
        rng: chooses among those of a kind.
    """
    length = signals.step_ranges[-1][1]
    influential = top_steps(signals.influence, fraction)
    uncertain = top_steps([fmean(signals.entropies[start:end]) for start, end in signals.step_ranges], fraction)
    steps = [k for k in range(1, len(signals.step_ranges) - 1) if eligible[k]]
    rng.shuffle(steps)
    steps.sort(key=lambda k: k not in influential and k not in uncertain)
    chosen = sorted(steps[:count])
    return [StepKind(k, k in influential, k in uncertain, signals.step_ranges[k][0] / length) for k in chosen]


def in_kind(disruption: Disruption, kind: str) -> bool:
    """Whether a disruption is of a kind of `KINDS`; a step of top influence and of top entropy is of both."""
    chosen = disruption.kind
    if kind == "rest":
        return not (chosen.influential or chosen.uncertain)
    return chosen.influential if kind == "influence" else chosen.uncertain


def position_bin(disruption: Disruption) -> int:
    return min(int(disruption.kind.position * NUM_POSITION_BINS), NUM_POSITION_BINS - 1)


def matched_difference(disruptions: Sequence[Disruption], kind: str, seed: int, draws: int = 2000) -> Interval:
    """Accuracy after corrupted steps of a kind minus that after the rest at the same position.

    Within each position bin that has both, the mean of the kind minus the mean of the rest; bins weigh by the number
    of steps of the kind.

    Args:
        disruptions: of all rollouts.
        kind: "influence" or "entropy".
        seed: of the bootstrap over prompts.
        draws: of it.

    Returns:
        Difference and both ends of its 95 % interval; NaN where no bin has both.
    """
    prompts = sorted({d.prompt for d in disruptions})
    place = {prompt: i for i, prompt in enumerate(prompts)}
    # Per prompt, bin and [kind, rest]: sum of right answers, and number of steps.
    sums = np.zeros((len(prompts), NUM_POSITION_BINS, 2, 2))
    for d in disruptions:
        for column, name in enumerate((kind, "rest")):
            if in_kind(d, name):
                sums[place[d.prompt], position_bin(d), column] += (d.correct, 1)

    def difference(totals: np.ndarray) -> float:  # (bins, 2, 2)
        right, steps = totals[..., 0], totals[..., 1]
        both = (steps > 0).all(axis=1)
        if not both.any():
            return float("nan")
        means = right[both] / steps[both]
        return float(np.average(means[:, 0] - means[:, 1], weights=steps[both, 0]))

    if not prompts:
        return _UNDEFINED
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=draws)
    resampled = [difference(np.tensordot(c, sums, axes=1)) for c in counts]
    if np.isnan(resampled).all():
        return _UNDEFINED
    return Interval(difference(sums.sum(axis=0)), *np.nanquantile(resampled, [0.025, 0.975]).tolist())


def accuracy(disruptions: Sequence[Disruption], seed: int) -> Interval:
    """Share of right answers after corrupted steps; a resample takes prompts with all their steps."""
    right: dict[int, float] = {}
    steps: dict[int, float] = {}
    for d in disruptions:
        right[d.prompt] = right.get(d.prompt, 0.0) + d.correct
        steps[d.prompt] = steps.get(d.prompt, 0.0) + 1
    if not steps:
        return _UNDEFINED
    return ratio((list(right.values()), list(steps.values())), seed)
