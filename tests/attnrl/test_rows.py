import math

import numpy as np
import pytest
import torch

from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import PromptRollouts
from attn_trainers.attnrl.rows import (
    collate,
    fit_capacity,
    importance_sampling_ratio,
    pad_rows,
    prompt_rows,
    training_rows,
)
from tests.helpers import float_array, make_continuation, make_rollout


def example_prompt():
    """The golden example of the method: a right rollout cut at 3 and 6, and a wrong one that is not expanded."""
    first = make_rollout(
        list(range(10)),
        reward=1.0,
        sampling_logps=float_array(*[-0.1 * i for i in range(10)]),
        old_logps=float_array(*[-0.2 * i for i in range(10)]),
        branches=[
            make_continuation(3, [21, 22], 0.0, float_array(-1.0, -2.0)),
            make_continuation(3, [23], 1.0, float_array(-3.0)),
            make_continuation(6, [24], 1.0, float_array(-4.0)),
            make_continuation(6, [25], 0.0, float_array(-5.0)),
        ],
    )
    second = make_rollout(list(range(7)))
    return PromptRollouts(Draw(0, 0), {}, [101, 102], [first, second])


def test_rows_of_the_golden_example():
    rows = training_rows(example_prompt(), train_unexpanded=False)
    assert [r.completion_ids.tolist() for r in rows] == [
        list(range(10)),
        [0, 1, 2, 21, 22],
        [0, 1, 2, 23],
        [0, 1, 2, 3, 4, 5, 24],
        [0, 1, 2, 3, 4, 5, 25],
    ]
    a, s1, s2 = 0.2 / math.sqrt(5), (1 / 6 + 1 / 15) / math.sqrt(3), 0.5 + 1 / 3
    expected = [
        [a] * 3 + [s1] * 3 + [s2] * 4,
        [a] * 3 + [-1.1] * 2,
        [a] * 3 + [0.9],
        [a] * 3 + [s1] * 3 + [0.5 + 1 / 3],
        [a] * 3 + [s1] * 3 + [-0.5 - 2 / 3],
    ]
    for r, advantages in zip(rows, expected, strict=True):
        np.testing.assert_allclose(r.advantages, advantages, rtol=1e-6)
    assert [r.fresh_from for r in rows] == [10, 3, 3, 6, 6]
    assert {r.tree for r in rows} == {"0/0"}
    assert {(r.completion_ids.dtype, r.old_logps.dtype) for r in rows} == {(np.dtype("int32"), np.dtype("float32"))}


def test_a_rows_prefix_keeps_the_stored_log_probs_to_the_bit():
    prompt = example_prompt()
    for r in training_rows(prompt, train_unexpanded=False):
        np.testing.assert_array_equal(r.old_logps[: r.fresh_from], prompt.rollouts[0].old_logps[: r.fresh_from])
        np.testing.assert_array_equal(
            r.sampling_logps[: r.fresh_from], prompt.rollouts[0].sampling_logps[: r.fresh_from]
        )
    np.testing.assert_array_equal(training_rows(prompt, False)[1].sampling_logps[3:], float_array(-1.0, -2.0))


def test_unexpanded_rollouts_are_trained_on_only_if_wanted():
    rows = training_rows(example_prompt(), train_unexpanded=True)
    assert len(rows) == 6
    np.testing.assert_allclose(rows[5].advantages, [-1.0] * 7)
    assert np.isnan(rows[5].sampling_logps).all()


def test_prompts_without_signal_and_filtered_ones_give_no_rows():
    prompt = example_prompt()
    assert len(prompt_rows(prompt, train_unexpanded=False)) == 5
    prompt.filtered = True
    assert prompt_rows(prompt, train_unexpanded=False) == []
    prompt.filtered = False
    for branch in prompt.rollouts[0].branches:
        branch.reward = 1.0
    assert prompt_rows(prompt, train_unexpanded=False) == []  # the wrong rollout is no leaf that is trained on
    assert len(prompt_rows(prompt, train_unexpanded=True)) == 6


@pytest.mark.parametrize(
    ("counts", "capacity", "kept"),
    [([5, 5, 5], 12, [0, 1]), ([5, 9, 5], 12, [0, 2]), ([], 4, []), ([0, 4, 1], 4, [0, 1]), ([5], 4, [])],
)
def test_capacity_is_filled_by_whole_prompts(counts, capacity, kept):
    assert fit_capacity(counts, capacity) == kept


def test_collate_pads_prompts_left_and_completions_right_and_masks_missing_rows():
    rows = training_rows(example_prompt(), train_unexpanded=False)[1:3]
    batch = collate([*rows, None], pad_token_id=0)
    assert batch["prompt_ids"].tolist() == [[101, 102], [101, 102], [0, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [1, 1], [0, 1]]
    assert batch["completion_ids"].tolist() == [[0, 1, 2, 21, 22], [0, 1, 2, 23, 0], [0] * 5]
    assert batch["completion_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [0] * 5]
    assert batch["fresh_mask"].tolist() == [[False] * 3 + [True] * 2, [False] * 3 + [True, False], [False] * 5]
    assert batch["advantages"][2].tolist() == [0.0] * 5


def test_a_micro_batch_of_missing_rows_only():
    batch = collate([None, None], pad_token_id=3)
    assert batch["completion_mask"].sum() == 0
    assert batch["prompt_mask"].tolist() == [[1], [1]]


def test_missing_rows_are_zeros_and_what_is_not_per_row_stays():
    batch = collate(training_rows(example_prompt(), train_unexpanded=False)[1:3], pad_token_id=0)
    padded = pad_rows(batch | {"total": torch.tensor(7)}, 4)
    assert {name: tensor.size(0) for name, tensor in padded.items() if name != "total"} == dict.fromkeys(batch, 4)
    assert padded["total"] == 7
    for name, tensor in batch.items():
        assert torch.equal(padded[name][:2], tensor)
        assert not padded[name][2:].any()


@pytest.mark.parametrize(
    ("mode", "clip_min", "expected"),
    [
        ("token_truncate", None, [[2.0, 3.0, 1.0]]),
        ("token_truncate", 1.5, [[2.0, 3.0, 1.5]]),
        ("token_mask", None, [[2.0, 0.0, 1.0]]),
        ("token_mask", 1.5, [[2.0, 0.0, 0.0]]),
        ("sequence_truncate", None, [[3.0]]),
        ("sequence_mask", None, [[0.0]]),
    ],
)
def test_importance_sampling_ratio(mode, clip_min, expected):
    old = torch.tensor([[math.log(2.0), math.log(4.0), 0.5]])
    sampling = torch.tensor([[0.0, 0.0, float("nan")]])
    ratio = importance_sampling_ratio(old, sampling, torch.ones(1, 3), mode, clip_min, 3.0)
    torch.testing.assert_close(ratio, torch.tensor(expected))
