"""One rank's head sets, factors, advantages, losses and weights equal two ranks', under DDP and ZeRO-3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attn_trainers.arithmetic import build_model, build_tokenizer


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden_size=64, num_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:  # attention that differs between tokens
            layer.self_attn.q_proj.weight.mul_(12.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def launch(config: str, num_ranks: int, model_dir: Path, folder: Path, generation: str = "given") -> dict:
    output = folder / f"{config}-{generation}.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(Path(__file__).with_name("run_rhythm.py"))]
    done = subprocess.run(
        [*command, str(model_dir), str(output), str(num_ranks), generation],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text()) | {"weights": load_file(output.with_suffix("") / "model.safetensors")}


@pytest.fixture(scope="module")
def one_rank(model_dir, tmp_path_factory):
    return launch("cpu", 1, model_dir, tmp_path_factory.mktemp("one-rank"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero3"])
def test_two_ranks_equal_one(config, one_rank, model_dir, tmp_path):
    two_ranks = launch(config, 2, model_dir, tmp_path)
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
    for name, weight in one_rank["weights"].items():
        torch.testing.assert_close(two_ranks["weights"][name], weight, rtol=1e-4, atol=1e-6)
