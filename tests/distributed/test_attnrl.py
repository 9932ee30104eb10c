"""One rank's samples, rows, losses, weights and controllers equal two ranks', with vLLM: DDP, ZeRO-3 and FSDP2."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_rank(run_ranks, tiny_model_dir, tmp_path_factory):
    return run_ranks("run_attnrl.py", "cpu", 1, tiny_model_dir, tmp_path_factory.mktemp("one-rank"), "vllm")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3", "cpu_fsdp2"])
def test_two_ranks_equal_one(run_ranks, config, one_rank, tiny_model_dir, tmp_path):
    one_rank, weights = one_rank
    two_ranks, two_weights = run_ranks("run_attnrl.py", config, 2, tiny_model_dir, tmp_path, "vllm")
    assert two_ranks["batches"] == one_rank["batches"]
    assert len(one_rank["batches"]) >= 3
    assert two_ranks["state"].pop("easy_influence") == pytest.approx(one_rank["state"]["easy_influence"], rel=1e-4)
    assert two_ranks["state"] == {k: v for k, v in one_rank["state"].items() if k != "easy_influence"}
    for one, two in zip(one_rank["history"], two_ranks["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two.get("attnrl/rows_trained") == one.get("attnrl/rows_trained")
    for name, weight in weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=1e-3, atol=1e-5)
    (first, second) = two_ranks["work"]
    assert first == second  # as many forwards and backwards on every rank
    differences = [entry.get("sampling/sampling_logp_difference/mean") for entry in two_ranks["history"]]
    assert max(d for d in differences if d is not None) < 1e-4  # the engines follow the weights
