"""The check of a first push: its probe and its bounds."""

import math
from types import SimpleNamespace

import pytest

from attn_trainers.base.sync_check import PROBE_TOKENS, SyncReadings, probe_tokens


def words(text: str, add_special_tokens: bool) -> SimpleNamespace:
    """A tokenizer: one token a word, its length."""
    assert not add_special_tokens
    return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def test_the_probe_is_what_the_prompts_say():
    plain = ["a bb ccc", "dddd"]
    assert probe_tokens(plain, words) == [1, 2, 3, 4] * (PROBE_TOKENS // 4)
    long = ["a bb " * PROBE_TOKENS]
    assert probe_tokens(long, words) == [1, 2] * (PROBE_TOKENS // 2)
    blocks = [{"type": "image"}, {"type": "text", "text": "ccc"}]
    messages = [{"role": "system", "content": "a bb"}, {"role": "user", "content": blocks}]
    assert probe_tokens([messages, "dddd"], words) == [1, 2, 3, 4] * (PROBE_TOKENS // 4)


def test_prompts_without_text_have_a_probe_too():
    def nothing(text: str, add_special_tokens: bool):
        return SimpleNamespace(input_ids=[])

    nothing.eos_token_id = 7
    assert probe_tokens([[{"role": "assistant", "content": None}]], nothing) == [7] * PROBE_TOKENS


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
