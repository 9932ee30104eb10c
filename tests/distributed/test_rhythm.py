"""One rank's head sets, factors, advantages, losses and weights equal two ranks', under DDP and ZeRO-3."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=64, num_layers=4)


@pytest.fixture(scope="module")
def one_rank(run_ranks, model_dir, tmp_path_factory):
    return run_ranks("run_rhythm.py", "cpu", 1, model_dir, tmp_path_factory.mktemp("one-rank"), "given")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3"])
def test_two_ranks_equal_one(run_ranks, config, one_rank, model_dir, tmp_path):
    one_rank, weights = one_rank
    two_ranks, two_weights = run_ranks("run_rhythm.py", config, 2, model_dir, tmp_path, "given")
    assert [batch["calibrated"] is not None for batch in one_rank["batches"]] == [False, True, True]
    for one, two in zip(one_rank["batches"], two_ranks["batches"], strict=True):
        assert two["heads"] == one["heads"] and two["calibrated"] == one["calibrated"]
        assert len(two["rows"]) == len(one["rows"]) == 24
        for (factors, advantages), (two_factors, two_advantages) in zip(one["rows"], two["rows"], strict=True):
            assert two_factors == factors
            assert two_advantages == pytest.approx(advantages, rel=1e-4, abs=1e-5)
        assert max(max(factors) for factors, _ in one["rows"]) > 1.0
    for one, two in zip(one_rank["history"], two_ranks["history"], strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    for name, weight in weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=1e-4, atol=1e-6)
