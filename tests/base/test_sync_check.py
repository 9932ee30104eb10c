"""The check of a first push: its probe and its bounds."""

import math

import pytest

from attn_trainers.base.sync_check import PROBE_TOKENS, SyncReadings, probe_tokens


def test_the_probe_is_the_same_everywhere_and_fits_the_engine():
    tokens = probe_tokens(1000, None)
    assert tokens == probe_tokens(1000, 4096) and len(tokens) == PROBE_TOKENS
    assert min(tokens) >= 0 and max(tokens) < 1000 and len(set(tokens)) > 40
    assert probe_tokens(1000, 16) == tokens[:15]  # the engine samples one more


@pytest.mark.parametrize(
    ("after", "before", "right"),
    [
        (0.001, 0.001, True),
        (0.0032, 0.001, True),  # up to three times the difference as loaded, and a thousandth of the spread
        (0.0036, 0.001, False),
        (0.024, None, True),  # up to a twentieth of the spread where nothing is known of before
        (0.026, None, False),
        (0.026, 1.0, False),  # ... and where the trainer had other weights
        (0.0, 1.0, True),
        (math.nan, None, False),
        (math.inf, 1.0, False),
    ],
)
def test_rounding_is_told_from_wrong_weights(after, before, right):
    readings = SyncReadings(after=after, before=before, spread=0.5)
    assert readings.is_right is right
    if not right:
        error = readings.error(["SomeModel"])
        assert error.startswith("use_vllm=True does not go with SomeModel: ") and "\n" not in error
        assert error.endswith("; set use_vllm to False, or use another model.")
