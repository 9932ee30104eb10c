"""Branch points, the filter of easy prompts, expansion and the prompt batch."""

import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnrl.exploration import (
    BranchPoints,
    PromptBatchController,
    RunningMean,
    choose_branch_points,
    choose_expanded,
    filter_easy_prompts,
    num_expanded,
    select_branch_points,
    select_entropy_points,
)


def steps_of(*lengths: int) -> list[tuple[int, int]]:
    """Ranges of steps of the given lengths."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


TEN_STEPS = steps_of(*[100] * 10)


# ---- attention ------------------------------------------------------------------------------------------------------


def test_the_quantile_is_interpolated_over_all_steps():
    # Sorted 0 1 2 3 4: the 0.8-quantile lies at 0.8 · 4 = 3.2, so that the step of influence 3 is no candidate.
    points = select_branch_points([0, 4, 3, 2, 1], TEN_STEPS[:5], 2, min_spacing=0)
    assert points == BranchPoints([100, 200], num_fallbacks=1)
    # At top_fraction=0.25 it lies at 3 exactly, which counts.
    points = select_branch_points([0, 4, 2, 1, 3], TEN_STEPS[:5], 2, top_fraction=0.25, min_spacing=0)
    assert points == BranchPoints([100, 400], num_fallbacks=0)


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_quantile_that_falls_on_a_step_takes_that_step(tenths):
    influence = [0.137 * k for k in (0, 7, 3, 10, 1, 9, 4, 8, 2, 6, 5)]
    points = select_branch_points(influence, steps_of(*[10] * 11), 10, top_fraction=tenths / 10, min_spacing=0)
    assert points.num_fallbacks == 10 - min(
        10, tenths + 1
    )  # sorted entries 10 - tenths to 10, the first step excepted


def test_the_earliest_candidates_are_taken_not_the_highest():
    influence = [0, 0, 5, 0, 0, 6, 0, 0, 9, 0]
    assert select_branch_points(influence, TEN_STEPS, 2, top_fraction=0.3, min_spacing=0).offsets == [200, 500]


def test_the_first_step_is_never_a_branch_point():
    influence = [9, 0, 0, 0, 8, 0, 0, 7, 0, 0]
    points = select_branch_points(influence, TEN_STEPS, 2, top_fraction=0.3, min_spacing=0)
    assert points == BranchPoints([400, 700], num_fallbacks=0)


def test_the_least_positive_influence_replaces_a_quantile_of_zero():
    influence = [0, 0, 0, 0, 0, 0, 3, 0, 0, 0]
    points = select_branch_points(influence, TEN_STEPS, 1, min_spacing=0)
    assert points == BranchPoints([600], num_fallbacks=0)


def test_all_steps_but_the_first_are_candidates_without_any_influence():
    assert select_branch_points([0] * 10, TEN_STEPS, 2, min_spacing=0) == BranchPoints([100, 200], 0)


def test_spacing_counts_from_the_start_and_from_the_end_of_a_taken_step():
    # Every step is a candidate. Step 3 starts at 300; the next to start 300 after its end, 400, is step 7.
    assert select_branch_points([0] * 10, TEN_STEPS, 2, min_spacing=300) == BranchPoints([300, 700], 0)
    assert select_branch_points([0] * 10, TEN_STEPS, 2, min_spacing=301) == BranchPoints([400, 900], 0)


def test_fallback_takes_the_earliest_steps_whatever_their_distance():
    assert select_branch_points([0] * 10, TEN_STEPS, 3, min_spacing=512) == BranchPoints([100, 200, 600], 2)
    assert select_branch_points([0] * 10, TEN_STEPS, 3, min_spacing=5000) == BranchPoints([100, 200, 300], 3)


def test_offsets_repeat_where_there_are_too_few():
    assert select_branch_points([0, 0, 0], steps_of(4, 5, 6), 5) == BranchPoints([4, 4, 4, 9, 9], 5)
    assert select_branch_points([0, 1], steps_of(4, 5), 2, min_spacing=0) == BranchPoints([4, 4], 1)


@pytest.mark.parametrize("criterion", ["attention", "random", "first_steps", "entropy"])
@pytest.mark.parametrize("length", [0, 1])
def test_a_completion_of_one_step_or_none_has_no_branch_point(criterion, length):
    ranges = steps_of(*[1] * length)
    signal = [1.0] * length
    points = choose_branch_points(
        criterion, step_ranges=ranges, influence=signal, entropies=signal, num_points=2, rng=random.Random(0)
    )
    assert points == BranchPoints([], 0)


def exact_selection(influence, ranges, num_points, top_fraction, spacing):
    """The rule with rational numbers, candidate by candidate."""
    count = len(influence)
    ordered = sorted(map(Fraction, influence))
    position = (1 - top_fraction) * (count - 1)
    low = math.floor(position)
    high = min(low + 1, count - 1)
    threshold = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    if threshold == 0 and ordered[-1] > 0:
        threshold = min(y for y in ordered if y > 0)
    taken = []
    for k in range(1, count):
        near = ranges[k][0] < spacing or any(ranges[k][0] - ranges[other][1] < spacing for other in taken)
        if influence[k] >= threshold and not near and len(taken) < num_points:
            taken.append(k)
    rest = [k for k in range(1, count) if k not in taken]
    while len(taken) + len(rest) < num_points:
        rest += range(1, count)
    fallbacks = rest[: num_points - len(taken)]
    return BranchPoints(sorted(ranges[k][0] for k in taken + fallbacks), len(fallbacks))


@settings(deadline=None, max_examples=300)
@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=2, max_size=25),
    num_points=st.integers(1, 6),
    top_fraction=st.sampled_from([Fraction(1, 5), Fraction(1, 4), Fraction(1, 2), Fraction(7, 10), Fraction(1)]),
    spacing=st.sampled_from([0, 1, 10, 60, 1000]),
)
def test_selection_of_random_steps(steps, num_points, top_fraction, spacing):
    influence = [y for y, _ in steps]
    ranges = steps_of(*(length for _, length in steps))
    points = select_branch_points(influence, ranges, num_points, float(top_fraction), spacing)
    assert points == exact_selection(influence, ranges, num_points, top_fraction, spacing)
    assert len(points.offsets) == num_points
    assert all(0 < offset < ranges[-1][1] for offset in points.offsets)


# ---- other criteria -------------------------------------------------------------------------------------------------


def test_entropy_branches_before_the_tokens_of_highest_entropy():
    assert select_entropy_points([9, 1, 4, 2, 5], 2) == BranchPoints([2, 4], 0)
    assert select_entropy_points([0, 3, 3, 3], 2) == BranchPoints([1, 2], 0)
    assert select_entropy_points([0, 3, 3], 4) == BranchPoints([1, 1, 2, 2], 2)


@settings(deadline=None, max_examples=100)
@given(entropies=st.lists(st.integers(0, 5), min_size=2, max_size=40), num_points=st.integers(1, 5))
def test_entropy_of_random_tokens(entropies, num_points):
    ordered = sorted(range(1, len(entropies)), key=lambda t: (-entropies[t], t))[:num_points]
    points = choose_branch_points("entropy", step_ranges=[], entropies=entropies, num_points=num_points)
    assert set(ordered) <= set(points.offsets) <= set(range(1, len(entropies)))
    assert len(points.offsets) == num_points
    assert points.num_fallbacks == num_points - len(ordered)


def test_first_steps_are_the_earliest_after_the_first():
    points = choose_branch_points("first_steps", step_ranges=TEN_STEPS, num_points=3)
    assert points == BranchPoints([100, 200, 300], 0)


def test_random_steps_are_drawn_without_replacement_from_the_generator_given():
    def draw(seed):
        return choose_branch_points("random", step_ranges=TEN_STEPS, num_points=3, rng=random.Random(seed))

    draws = [draw(seed).offsets for seed in range(600)]
    assert draws == [draw(seed).offsets for seed in range(600)]
    assert all(len(set(offsets)) == 3 and offsets == sorted(offsets) for offsets in draws)
    counts = Counter(offset for offsets in draws for offset in offsets)
    assert sorted(counts) == [start for start, _ in TEN_STEPS[1:]]
    assert all(abs(count - 200) < 60 for count in counts.values())  # 200 expected, standard deviation 11.5


def test_random_steps_repeat_only_where_there_are_too_few():
    points = choose_branch_points("random", step_ranges=steps_of(4, 5, 6), num_points=3, rng=random.Random(1))
    assert points == BranchPoints([4, 4, 9], 1)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("attention", "influence=None"),
        ("entropy", "entropies=None"),
        ("random", "rng=None"),
        ("oracle", "truth=None"),
        ("depth", "criterion='depth'"),
    ],
)
def test_a_criterion_without_its_signal_is_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        choose_branch_points(criterion, step_ranges=TEN_STEPS, num_points=2)


def test_the_oracle_branches_at_the_steps_that_matter_most():
    def chosen(truth, num_points, seed=0):
        rng = random.Random(seed)
        return choose_branch_points("oracle", step_ranges=TEN_STEPS, num_points=num_points, truth=truth, rng=rng)

    starts = [start for start, _ in TEN_STEPS]
    assert chosen([9, 0, 0, 1, 0, 3, 0, 2, 0, 0], 2) == BranchPoints([starts[5], starts[7]])  # never the first step
    # Steps that do not matter are fallbacks, the earliest first.
    assert chosen([1, 0, 0, 1, 0, 0, 0, 0, 0, 0], 2) == BranchPoints([starts[1], starts[3]], 1)
    drawn = {tuple(chosen([0, 1, 0, 1, 0, 1, 0, 0, 0, 0], 1, seed).offsets) for seed in range(30)}
    assert drawn == {(starts[1],), (starts[3],), (starts[5],)}
    with pytest.raises(ValueError, match="truth has 2 entries for 10 steps"):
        chosen([1, 0], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 0}, "num_points=0"),
        ({"top_fraction": 0.0}, "top_fraction=0.0"),
        ({"top_fraction": 1.2}, "top_fraction=1.2"),
        ({"influence": [1.0]}, "influence has 1 entries for 10 steps"),
    ],
)
def test_selection_refuses_what_it_cannot_honour(options, message):
    with pytest.raises(ValueError, match=message):
        choose_branch_points(
            "attention", **({"step_ranges": TEN_STEPS, "influence": [0.0] * 10, "num_points": 2} | options)
        )


# ---- easy prompts ---------------------------------------------------------------------------------------------------


def test_easy_prompts_are_kept_above_the_mean_that_includes_them():
    mean = RunningMean()
    assert math.isnan(mean.mean)
    # Solved: 1, 3 and 2, of mean 2; a tie is dropped, what is not solved is kept and does not count.
    kept = filter_easy_prompts([1.0, 1.0, 5 / 6, 0.0, 1.0], [1.0, 3.0, 0.0, 90.0, 2.0], mean)
    assert kept == [False, True, True, True, False]
    assert (mean.mean, mean.count) == (2.0, 3)
    # All batches weigh by their prompts: (1 + 3 + 2 + 10 + 4) / 5 = 4.
    assert filter_easy_prompts([1.0, 1.0], [10.0, 4.0], mean) == [True, False]
    assert mean.mean == 4.0


def test_the_first_solved_prompt_alone_is_dropped():
    assert filter_easy_prompts([1.0], [0.7], RunningMean()) == [False]


def test_running_mean_is_restored_from_its_state():
    mean = RunningMean()
    for value in (0.1, 0.25, 0.7):
        mean.update(value)
    restored = RunningMean()
    restored.load_state_dict(mean.state_dict())
    for each in (mean, restored):
        each.update(3.0)
    assert restored == mean
    assert mean.mean == pytest.approx(4.05 / 4)


# ---- expansion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("ceil", [6, 6, 5, 4, 4, 3, 3]), ("round", [6, 5, 4, 4, 3, 3, 2]), ("uniform", [6] * 7)],
)
def test_number_expanded_of_six(rounding, expected):
    assert [num_expanded(correct, 6, rounding) for correct in range(7)] == expected


@settings(deadline=None, max_examples=300)
@given(
    correct=st.lists(st.booleans(), min_size=1, max_size=16), rounding=st.sampled_from(["ceil", "round", "uniform"])
)
def test_expanded_rollouts_hold_the_whole_minority(correct, rounding):
    expanded = choose_expanded(correct, rounding, random.Random(3))
    assert expanded == sorted(set(expanded))
    assert len(expanded) == num_expanded(sum(correct), len(correct), rounding)
    assert set(expanded) <= set(range(len(correct)))
    if 0 < sum(correct) < len(correct):
        minority = 2 * sum(correct) < len(correct)  # the value that marks it; wrong ones where both are as many
        assert {i for i, c in enumerate(correct) if c == minority} <= set(expanded)
    else:
        assert expanded == list(range(len(expanded)))


def test_others_are_drawn_at_random():
    correct = [True, False, True, True, True, True]  # M = 3: the wrong one and two of five
    drawn = Counter(tuple(choose_expanded(correct, "ceil", random.Random(seed))) for seed in range(500))
    assert len(drawn) == 10
    assert all(1 in indices for indices in drawn)
    assert all(abs(count - 50) < 35 for count in drawn.values())  # 50 expected, standard deviation 6.7


def test_expansion_refuses_what_it_cannot_honour():
    with pytest.raises(ValueError, match="num_correct=7"):
        num_expanded(7, 6)
    with pytest.raises(ValueError, match="num_rollouts=0"):
        num_expanded(0, 0)
    with pytest.raises(ValueError, match="rounding='floor'"):
        num_expanded(1, 6, "floor")


# ---- prompt batch ---------------------------------------------------------------------------------------------------


def test_prompt_batch_follows_the_yield():
    # 960 rows of 64 prompts: 128 prompts would give 1920; 0.9 · 64 + 0.1 · 128 = 70.4.
    assert PromptBatchController(1920, 64, rounding="ceil").update(64, 960) == 71
    assert PromptBatchController(1920, 64, rounding="round").update(64, 960) == 70
    # The yield is that of the batch it was measured on, whatever the size is by now: 1920 · 100 / 2400 = 80.
    assert PromptBatchController(1920, 70).update(100, 2400) == 71


@pytest.mark.parametrize("rounding", ["round", "ceil"])
@pytest.mark.parametrize("smoothing", [0.9, 0.2, 0.1])  # 0.1 · 13 + (1 - 0.1) · 13 is more than 13
def test_a_batch_of_the_wanted_yield_keeps_its_size(rounding, smoothing):
    for size in range(1, 400):
        controller = PromptBatchController(30 * size, size, smoothing=smoothing, rounding=rounding)
        assert controller.update(size, 30 * size) == size


def test_one_batch_moves_the_target_by_a_bounded_factor():
    assert PromptBatchController(1920, 100).update(100, 0) == 110  # no signal: the bound itself, 200
    assert PromptBatchController(1920, 100).update(100, 1) == 110
    assert PromptBatchController(1920, 100).update(1, 1920) == 95
    assert PromptBatchController(1920, 100, max_change=3.0).update(100, 1) == 120
    assert PromptBatchController(1920, 100, smoothing=0.0).update(100, 960) == 200


def test_prompt_batch_stays_within_its_bounds():
    controller = PromptBatchController(1920, 64, max_size=80)
    assert [controller.update(64, 0) for _ in range(5)] == [70, 77, 80, 80, 80]
    single = PromptBatchController(1920, 1, smoothing=0.0)
    assert [single.update(100, 1920 * 100) for _ in range(3)] == [1, 1, 1]


def test_prompt_batch_is_restored_from_its_state():
    controller = PromptBatchController(1920, 64)
    controller.update(64, 700)
    restored = PromptBatchController(1920, 64)
    restored.load_state_dict(controller.state_dict())
    assert restored.size == controller.size == 70  # the target is bounded at 128
    assert restored.update(70, 900) == controller.update(70, 900)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"target_rows": 0}, "target_rows=0"),
        ({"rounding": "floor"}, "rounding='floor'"),
        ({"smoothing": 1.5}, "smoothing=1.5"),
        ({"max_change": 0.5}, "max_change=0.5"),
        ({"max_size": 63}, "max_size=63"),
    ],
)
def test_controller_refuses_what_it_cannot_honour(options, message):
    with pytest.raises(ValueError, match=message):
        PromptBatchController(**({"target_rows": 1920, "size": 64} | options))
