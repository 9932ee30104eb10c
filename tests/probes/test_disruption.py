"""Steps with wrong numbers: choice, corruption, closed forms of the comparison."""

import math
import random
import re

import pytest

from attn_trainers.probes.disruption import (
    Disruption,
    StepKind,
    accuracy,
    choose_steps,
    corrupt_numbers,
    in_kind,
    matched_difference,
    position_bin,
    top_steps,
)
from attn_trainers.probes.measure import RolloutSignals


@pytest.mark.parametrize("seed", range(20))
def test_every_number_changes_and_nothing_else(seed):
    text = "So 12 + 7 = 19, or 12.50 dollars; 0 left."
    changed = corrupt_numbers(text, random.Random(seed))
    assert re.sub(r"\d", "#", changed) == re.sub(r"\d", "#", text)
    old, new = re.findall(r"\d+", text), re.findall(r"\d+", changed)
    assert all(a != b for a, b in zip(old, new, strict=True))
    assert new[0] == new[3]  # 12 is another number, but one
    assert all(b[0] != "0" for a, b in zip(old, new, strict=True) if a[0] != "0")


def test_text_without_numbers_stays():
    assert corrupt_numbers("So they sum up.", random.Random(0)) == "So they sum up."


def test_top_steps_are_those_at_the_quantile():
    assert top_steps([9.0, 1.0, 5.0, 4.0, 2.0], 0.4) == {2}  # the first step, though the highest, is none
    assert top_steps([0.0, 0.0, 0.0, 0.0, 3.0], 0.2) == {4}
    assert top_steps([0.0] * 5, 0.2) == set() and top_steps([4.0], 0.2) == set()


def test_top_steps_come_first_then_others():
    ranges = [(5 * k, 5 * k + 5) for k in range(10)]
    influence = [0.0, 1.0, 8.0, 2.0, 9.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    entropies = [float(k in (2, 6)) for k in range(10) for _ in range(5)]
    signals = RolloutSignals(ranges, influence, entropies)
    every = choose_steps(signals, [True] * 10, 0.2, 99, random.Random(0))
    assert [one.step for one in every] == list(range(1, 9))  # neither the first nor the last
    assert [one.step for one in every if one.influential] == [2, 4]
    assert [one.step for one in every if one.uncertain] == [2, 6]
    assert every[3].position == 20 / 50
    three = choose_steps(signals, [True] * 10, 0.2, 3, random.Random(1))
    assert [one.step for one in three] == [2, 4, 6]
    assert [one.step for one in choose_steps(signals, [k == 5 for k in range(10)], 0.2, 3, random.Random(1))] == [5]


def disruption(prompt: int, position: float, correct: float, *, top: bool) -> Disruption:
    return Disruption(prompt, StepKind(1, top, False, position), correct)


def test_bins_and_kinds():
    one = disruption(0, 0.99, 1.0, top=True)
    assert position_bin(one) == 4 and position_bin(disruption(0, 0.2, 1.0, top=True)) == 1
    assert [in_kind(one, kind) for kind in ("influence", "entropy", "rest")] == [True, False, False]


def test_matched_difference_holds_the_position_fixed():
    # Early steps are right less often, and top steps are early: unmatched they differ, matched they do not.
    rows = [(0.1, 0.0, True), (0.1, 0.0, True), (0.1, 0.0, False), (0.5, 1.0, True)]
    rows += [(0.5, 1.0, False), (0.5, 1.0, False), (0.5, 1.0, False)]
    sample = [disruption(0, position, right, top=top) for position, right, top in rows]
    assert accuracy([d for d in sample if in_kind(d, "influence")], 0).value == pytest.approx(1 / 3)
    assert accuracy([d for d in sample if in_kind(d, "rest")], 0).value == pytest.approx(3 / 4)
    interval = matched_difference(sample, "influence", 0)
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_matched_difference_weighs_bins_by_top_steps():
    # Bin 0: 0 - 1 with two top steps; bin 2: 1 - 0 with one. A bin with one kind alone does not count.
    rows = [(0.1, 0.0, True), (0.1, 0.0, True), (0.1, 1.0, False), (0.5, 1.0, True), (0.5, 0.0, False)]
    sample = [disruption(p, *row[:2], top=row[2]) for p in range(3) for row in [*rows, (0.9, 1.0, True)]]
    interval = matched_difference(sample, "influence", 0)
    assert (interval.value, interval.low, interval.high) == pytest.approx((-1 / 3, -1 / 3, -1 / 3))


def test_nothing_to_compare_is_undefined():
    for sample in ([], [disruption(0, 0.1, 1.0, top=True)]):
        assert math.isnan(matched_difference(sample, "influence", 0).value)
    assert math.isnan(accuracy([], 0).value)
