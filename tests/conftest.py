"""Fixtures every test may use."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Engines of test processes that run side by side must not be pinned to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference data that lies beside the project; a test that needs it is skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("reference data (../shared) is absent")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Word-level tokenizer of the arithmetic task."""
    from attn_trainers.arithmetic import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folder of a random two-layer Qwen2 with the arithmetic tokenizer."""
    import torch

    from attn_trainers.arithmetic import build_model

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    build_model(tiny_tokenizer, hidden_size=64, num_layers=2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_sharp_model(tmp_path_factory, tiny_tokenizer):
    """Saves a random Qwen2 whose attention differs between tokens and heads, with its tokenizer."""
    import torch

    from attn_trainers.arithmetic import build_model

    def build(hidden_size: int, num_layers: int, sharpness: float = 12.0) -> Path:
        folder = tmp_path_factory.mktemp("sharp-model")
        torch.manual_seed(0)
        model = build_model(tiny_tokenizer, hidden_size, num_layers)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(sharpness)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def arithmetic_dataset():
    """24 problems with conversational prompts and answers."""
    from attn_trainers.arithmetic import sample_problems
    from attn_trainers.tiny import to_dataset

    return to_dataset(sample_problems(24, seed=0))


def outside_environment() -> dict[str, str]:
    """The environment without what an engine or an earlier run in this process set for its own ranks."""
    leave_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in leave_out}


@pytest.fixture
def environment() -> dict[str, str]:
    """`outside_environment`, for a test that starts a process of its own."""
    return outside_environment()


def launch_script(config: str, script: Path, *arguments: object, timeout: float = 600) -> None:
    """Run a script by `accelerate launch` under one of the project's configurations, and fail with its error output.

    The rendezvous gets a free port, so that launches side by side do not meet.
    """
    environment = outside_environment()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port), "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="session")
def launch():
    """`launch_script`, for tests of several ranks and of whole recipes."""
    return launch_script


@pytest.fixture(scope="session")
def run_ranks(launch):
    """Runs a training script on some ranks and returns what it wrote to its output file, and its final weights."""
    from safetensors.torch import load_file

    def run(script: str, config: str, num_ranks: int, model_dir: Path, folder: Path, generation: str):
        output = folder / f"{config}-{generation}.json"
        launch(config, ROOT / "tests" / "distributed" / script, model_dir, output, num_ranks, generation)
        return json.loads(output.read_text()), load_file(output.with_suffix("") / "model.safetensors")

    return run
