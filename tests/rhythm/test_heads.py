"""Pooled spans and calibrated head sets."""

import json

import pytest
import torch

from attn_trainers.attention import RhythmProfile
from attn_trainers.attention.heads import HeadSets
from attn_trainers.rhythm.heads import HeadCalibration, PooledSpans


HEADS = [(1, 0), (1, 1), (2, 0), (2, 1)]


def profile(spans: list[float], tokens: int) -> RhythmProfile:
    return RhythmProfile(HEADS, torch.tensor(spans), torch.zeros(4, tokens), torch.zeros(4, tokens))


def spans(values: list[float], responses: int = 2) -> PooledSpans:
    return PooledSpans(torch.tensor(values, dtype=torch.float64), 10, responses)


def test_every_token_weighs_the_same():
    pooled = PooledSpans.of([profile([10.0, 4.0, 8.0, 2.0], 2), profile([2.0, 40.0, 8.0, 9.0], 8)])
    assert (pooled.tokens, pooled.responses) == (10, 2)
    assert pooled.span_sum.tolist() == [12.0, 44.0, 16.0, 11.0]
    assert pooled.rank(HEADS, 0.5) == HeadSets([(2, 1), (1, 0)], [(2, 0), (1, 1)])


def test_responses_without_tokens_count_nothing():
    pooled = PooledSpans.of([profile([0.0, 0.0, 0.0, 0.0], 0), profile([1.0, 2.0, 3.0, 4.0], 5)])
    assert (pooled.tokens, pooled.responses) == (5, 1)
    both = pooled + spans([1.0, 1.0, 1.0, 1.0])
    assert (both.span_sum.tolist(), both.tokens, both.responses) == ([2.0, 3.0, 4.0, 5.0], 15, 3)


def test_calibration_waits_for_enough_responses_and_then_stays():
    calibration = HeadCalibration(responses=4, refresh_every=0, fraction=0.25)
    calibration.update(spans([1.0, 2.0, 3.0, 4.0]), HEADS)
    assert calibration.heads is None
    calibration.update(spans([9.0, 2.0, 3.0, 4.0]), HEADS)
    assert calibration.heads == HeadSets([(1, 1)], [(1, 0)])
    calibration.update(spans([0.0, 2.0, 3.0, 99.0], responses=50), HEADS)
    assert calibration.heads == HeadSets([(1, 1)], [(1, 0)])


def test_refresh_keeps_the_old_heads_until_the_new_are_known():
    calibration = HeadCalibration(responses=4, refresh_every=3, fraction=0.25)
    first, second = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    seen = []
    for values in [first, first, second, second, second, second, second]:
        calibration.update(spans(values), HEADS)
        seen.append(calibration.heads and calibration.heads.local_heads)
    # Calibrated by the second batch; begun anew by the third after it, done by the fourth.
    assert seen == [None, [(1, 0)], [(1, 0)], [(1, 0)], [(1, 0)], [(2, 1)], [(2, 1)]]


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
def test_state_survives_json(updates):
    calibration = HeadCalibration(responses=4, refresh_every=2, fraction=0.25)
    for _ in range(updates):
        calibration.update(spans([1.0, 2.0, 3.0, 4.0]), HEADS)
    restored = HeadCalibration(responses=4, refresh_every=2, fraction=0.25)
    restored.load_state_dict(json.loads(json.dumps(calibration.state_dict())))
    for _ in range(4):
        for one in (calibration, restored):
            one.update(spans([4.0, 3.0, 2.0, 1.0]), HEADS)
        assert restored.heads == calibration.heads
        assert restored.state_dict() == calibration.state_dict()
