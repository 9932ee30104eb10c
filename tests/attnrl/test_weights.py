import numpy as np
import pytest

from attn_trainers.attnrl.rows import TrainingRow
from attn_trainers.attnrl.weights import part_weights


def row(length):
    zeros = np.zeros(length, dtype=np.float32)
    return TrainingRow([0], np.zeros(length, dtype=np.int32), zeros, zeros, zeros, length)


def length(one):
    return len(one.completion_ids)


# Two micro-batches on two ranks: 3 and 1 rows, then 1 row and none.
UPDATE = [[[row(2), row(4), row(6)], [row(8)]], [[row(10)], []]]


def of_ranks(loss_type, update=UPDATE, count=length):
    return [part_weights(update, rank, loss_type, 7, count) for rank in range(2)]


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "dr_grpo"])
def test_a_row_weighs_one_over_the_rows_of_the_update(loss_type):
    # TRL: mean over the tensors' rows, over steps; gradients are means over the two ranks.
    for weights in of_ranks(loss_type):
        assert [w.num_rows for w in weights] == [3, 1]
        assert [1 / (w.num_rows * w.steps) / 2 for w in weights] == pytest.approx([1 / 5] * 2)
    assert [w.metric_scale for w in of_ranks(loss_type)[0]] == pytest.approx([2 * 3 / 4, 2 * 1 / 1])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_a_token_weighs_one_over_the_tokens_of_the_update(loss_type):
    for weights in of_ranks(loss_type):
        # TRL's normaliser: num_items / ranks * steps / steps_per_generation.
        normalisers = [w.num_items / 2 * w.steps / 7 for w in weights]
        assert [1 / n / 2 for n in normalisers] == pytest.approx([1 / 30] * 2)


def test_a_part_of_bnpo_weighs_one_over_the_parts_with_rows():
    for weights in of_ranks("bnpo"):
        assert [1 / w.steps / 2 for w in weights] == pytest.approx([1 / 3] * 2)
    assert [w.metric_scale for w in of_ranks("bnpo")[0]] == [1.0, 2.0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_token_shares_are_those_of_the_update_over_all_ranks(loss_type):
    shares = [[w.token_share / 2 for w in weights] for weights in of_ranks(loss_type)]
    assert shares == [pytest.approx([12 / 30, 10 / 30]), pytest.approx([8 / 30, 0.0])]


def test_an_update_of_which_no_token_counts_divides_by_nothing():
    for loss_type in ("grpo", "dapo", "bnpo"):
        for weights in of_ranks(loss_type, count=lambda one: 0):
            assert all(w.steps > 0 and w.token_share == 0.0 and w.num_items == 0.0 for w in weights)
