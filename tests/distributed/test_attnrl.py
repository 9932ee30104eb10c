"""One rank's samples, rows, losses, weights and controllers equal two ranks', under DDP and ZeRO-3 with vLLM
colocate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def run(launch, config: str, num_ranks: int, model_dir: Path, folder: Path) -> dict:
    """What a run of three generation batches did, with its final weights."""
    output = folder / f"{config}.json"
    launch(config, Path(__file__).with_name("run_attnrl.py"), model_dir, output, num_ranks, "vllm")
    return json.loads(output.read_text()) | {"weights": load_file(output.with_suffix("") / "model.safetensors")}


@pytest.fixture(scope="module")
def one_rank(launch, tiny_model_dir, tmp_path_factory):
    return run(launch, "cpu", 1, tiny_model_dir, tmp_path_factory.mktemp("one-rank"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3"])
def test_two_ranks_equal_one(launch, config, one_rank, tiny_model_dir, tmp_path):
    two_ranks = run(launch, config, 2, tiny_model_dir, tmp_path)
    assert two_ranks["batches"] == one_rank["batches"]
    assert len(one_rank["batches"]) == 3
    assert two_ranks["state"].pop("easy_influence") == pytest.approx(one_rank["state"]["easy_influence"], rel=1e-4)
    assert two_ranks["state"] == {k: v for k, v in one_rank["state"].items() if k != "easy_influence"}
    for one, two in zip(one_rank["history"], two_ranks["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["attnrl/rows_trained"] == one["attnrl/rows_trained"]
    for name, weight in one_rank["weights"].items():
        torch.testing.assert_close(two_ranks["weights"][name], weight, rtol=1e-3, atol=1e-5)
    (first, second) = two_ranks["work"]
    assert first == second  # as many forwards and backwards on every rank
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in two_ranks["history"]]
    assert max(d for d in differences if d is not None) < 5e-3  # the engines follow the weights
