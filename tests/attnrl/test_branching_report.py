"""What a sample of rollouts says about branching."""

import math

import pytest

from attn_trainers.attnrl.branching_report import report_branching


def rollout(influence: list[float], width: int = 10) -> tuple[list[tuple[int, int]], list[float]]:
    """Ranges of as many steps of `width` tokens, and the influence."""
    return [(width * step, width * (step + 1)) for step in range(len(influence))], influence


def report(*rollouts, **options):
    ranges, influences = zip(*rollouts, strict=True) if rollouts else ((), ())
    return report_branching(ranges, influences, **{"num_points": 2, "min_spacing": 0, **options})


LATE = rollout([0, 1, 1, 1, 1, 9, 9, 0, 0, 0])  # the best steps are 5 and 6: offsets 50 and 60 of 100
EARLY = rollout([0, 9, 9, 1, 1, 1, 1, 0, 0, 0])
POOR = rollout([0, 1, 0, 0, 0])


def test_attention_that_chooses_late_steps():
    found = report(LATE)
    assert (found.num_rollouts, found.steps_per_rollout, found.influence_share) == (1, 10.0, 0.6)
    assert (found.fallback_share, found.first_steps_agreement) == (0.0, 0.0)
    assert found.mean_position == pytest.approx(0.55)
    assert found.advice == ""
    assert str(found) == (
        "1 rollouts of 10.0 steps, 60% of them with influence; of the branch points 0% are fallbacks and 0% those of "
        "branching='first_steps', at 0.55 of the rollout on average."
    )


def test_shares_are_over_all_steps_and_points():
    # POOR: step 1 by influence, step 2 as fallback, at 10 and 20 of 50.
    found = report(LATE, POOR)
    assert found.influence_share == 7 / 15
    assert (found.fallback_share, found.first_steps_agreement) == (0.25, 0.5)
    assert found.mean_position == pytest.approx((0.5 + 0.6 + 0.2 + 0.4) / 4)


def test_an_offset_chosen_twice_agrees_as_often_as_first_steps_repeats_it():
    found = report(rollout([0, 1]), num_points=3)
    assert (found.first_steps_agreement, found.mean_position) == (1.0, 0.5)
    assert found.fallback_share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("step_mode", "advised"),
    [
        (
            "paragraphs",
            'influence_delta=4 leaves few of their steps with influence; set step_mode to "lines" or "sent',
        ),
        ("lines", 'with influence; set step_mode to "sentences".'),
        ("sentences", "influence_delta=4 leaves few of their steps with influence; set it to a lower number"),
    ],
)
def test_few_steps_with_influence_call_for_finer_ones(step_mode, advised):
    found = report(POOR, step_mode=step_mode)
    assert found.influence_share == 0.2
    assert found.first_steps_agreement == 1.0
    assert advised in found.advice


def test_early_steps_of_most_influence_call_for_the_mean():
    assert 'set influence_aggregation="mean"' in report(EARLY).advice
    assert "set branch_top_fraction lower" in report(EARLY, aggregation="mean").advice


def test_a_distance_that_no_rollout_has_is_named_with_what_is_gained_without():
    found = report(LATE, min_spacing=512)
    assert (found.fallback_share, found.first_steps_agreement) == (1.0, 1.0)
    assert found.advice == (
        "Attention hardly chooses the branch points: min_branch_spacing=512 is too far for their length; set it to 0 "
        "and 0% are fallbacks, 0% those of first_steps."
    )
    both = report(POOR, min_spacing=512).advice
    assert "set it to 0 and 50% are fallbacks, 100% those of first_steps. Then influence_delta=4 leaves" in both


def test_rollouts_of_one_step_are_not_branched():
    found = report(rollout([0.0]))
    assert math.isnan(found.first_steps_agreement) and found.influence_share == 0.0
    assert found.advice == 'No rollout has two steps, so none is branched; set step_mode to "lines" or "sentences".'
    assert report().num_rollouts == 0
