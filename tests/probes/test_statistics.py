"""Closed forms of what trees say of a criterion."""

import math

import pytest

from attn_trainers.probes.statistics import (
    Interval,
    Tree,
    outcome,
    prompts_needed,
    ratio,
    ratio_difference,
    summarise,
    sums_of,
)


def tree(prompt: int, correct: float, rewards: list[float], *, offsets=(2, 5), fallbacks=0, agreeing=1, tokens=3):
    return Tree(prompt, correct, 10, list(offsets), fallbacks, agreeing, rewards, [tokens] * len(rewards))


# Prompt 0: a mixed tree and one all right; prompt 1: solved at first, then wrong; prompt 2: all wrong.
TREES = [
    tree(0, 1.0, [1.0, 0.0, 1.0, 1.0]),
    tree(0, 1.0, [1.0, 1.0, 1.0, 1.0], fallbacks=2),
    tree(1, 1.0, [0.0, 0.0, 0.0, 0.0], offsets=(4, 4), agreeing=0),
    tree(1, 1.0, [1.0, 1.0, 1.0, 1.0]),
    tree(2, 0.0, [0.0, 0.0, 0.0, 0.0], agreeing=2),
    tree(2, 0.0, [], offsets=(), agreeing=0),
]


def test_measures_of_known_trees():
    values = {name: interval.value for name, interval in summarise(TREES).items()}
    assert values == pytest.approx(
        {
            "position": (0.2 + 0.5) * 4 / 10 + (0.4 + 0.4) / 10,  # ten points in all
            "fallbacks": 2 / 10,
            "agreement": (1 + 1 + 0 + 1 + 2) / 10,
            "trees_right": 2 / 6,
            "trees_mixed": 2 / 6,  # the rollout is a leaf: right before four wrong continuations is mixed
            "trees_wrong": 2 / 6,
            "prompts_right": 0.0,
            "prompts_mixed": 2 / 3,
            "prompts_wrong": 1 / 3,
            "solved_broken": 1.0,  # both solved prompts have a wrong continuation
            "variance": (3 / 16 + 0 + 0 + 0 + 0) / 5,  # the tree without branches has none
            "tokens_per_mixed_tree": (6 * 10 + 5 * 4 * 3) / 2,
        }
    )


def test_a_single_continuation_has_no_variance():
    assert math.isnan(summarise([tree(0, 1.0, [1.0]), tree(1, 0.0, [1.0])])["variance"].value)
    assert summarise([tree(0, 1.0, [1.0]), tree(1, 0.0, [1.0, 0.0])])["variance"].value == 1 / 4


def test_outcomes():
    assert [outcome(one) for one in ([1.0, 1.0], [0.0], [0.0, 1.0])] == ["right", "wrong", "mixed"]


def test_sums_are_by_prompt_in_order():
    assert sums_of(TREES[::-1], "trees_mixed") == ([1.0, 1.0, 0.0], [2.0, 2.0, 2.0])


def test_the_interval_of_two_prompts_is_that_of_a_binomial():
    # Two prompts, shares 0 and 1: a resample has mean 0, 1/2 or 1 with 1/4, 1/2, 1/4, so the tails of 2.5 % hold both.
    assert ratio(([0.0, 1.0], [1.0, 1.0])) == Interval(0.5, 0.0, 1.0)
    assert ratio(([3.0, 1.0], [6.0, 2.0])) == Interval(0.5, 0.5, 0.5)  # the same ratio in each


def test_a_ratio_weighs_prompts_by_their_denominator():
    assert ratio(([1.0, 9.0], [1.0, 3.0])).value == 10 / 4


def test_no_denominator_is_infinite_or_undefined():
    endless = ratio(([5.0, 5.0], [0.0, 0.0]))
    assert endless == Interval(math.inf, math.inf, math.inf)
    assert all(math.isnan(value) for value in vars(ratio(([0.0, 0.0], [0.0, 0.0]))).values())
    # One prompt in two has a mixed tree: a quarter of the resamples have none.
    assert ratio(([5.0, 5.0], [0.0, 2.0])) == Interval(5.0, 2.5, math.inf)


def test_differences_are_paired():
    # Both vary over prompts, their difference does not.
    first, second = ([0.0, 1.0, 2.0, 3.0], [1.0] * 4), ([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    difference = ratio_difference(first, second)
    assert (difference.value, difference.low, difference.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert not difference.holds_zero and ratio_difference(first, first).holds_zero
    with pytest.raises(ValueError, match="first has 4 prompts and second 1"):
        ratio_difference(first, ([1.0], [1.0]))


def test_prompts_needed_grow_with_the_square():
    assert prompts_needed(Interval(0.0, -0.1, 0.1), 30, 0.05) == 120
    assert prompts_needed(Interval(0.02, -0.03, 0.07), 30, 0.05) == 30
