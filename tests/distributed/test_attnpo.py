"""One rank's losses, metrics and weights equal two ranks', under DDP, ZeRO-3 and FSDP2; ZeRO-3 with vLLM colocate."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=64, num_layers=2, sharpness=16.0)


@pytest.fixture(scope="module")
def one_rank(run_ranks, model_dir, tmp_path_factory):
    return run_ranks("run_attnpo.py", "cpu", 1, model_dir, tmp_path_factory.mktemp("one-rank"), "given")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3", "cpu_fsdp2"])
def test_two_ranks_equal_one(run_ranks, config, one_rank, model_dir, tmp_path):
    history, weights = one_rank
    two_history, two_weights = run_ranks("run_attnpo.py", config, 2, model_dir, tmp_path, "given")
    assert len(history) == 2
    for one, two in zip(history, two_history, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
        assert one["attnpo/steps_attenuated"] > 0 and one["attnpo/accuracy"] > 0
    for name, weight in weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_zero3_with_vllm_colocate(run_ranks, tiny_model_dir, tmp_path):
    history, weights = run_ranks("run_attnpo.py", "cpu_zero3", 2, tiny_model_dir, tmp_path, "vllm")
    start = load_file(tiny_model_dir / "model.safetensors")
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in history)
    assert any(not torch.equal(weights[name], start[name]) for name in start)
    # The second batch is sampled with the weights of the first update.
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in history]
    assert max(differences) < 1e-4, differences
