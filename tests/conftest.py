"""Fixtures every test may use."""

import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import ROOT, launch_script, outside_environment


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Engines of test processes that run side by side must not be pinned to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

EXTENSIONS = pytest.StashKey[str]()


def pytest_configure(config):
    """A folder for the C++ code that DeepSpeed compiles at its first start, shared by all test processes of this run.

    In the usual place, a process that was killed while it compiled leaves a lock, and each later start waits for it.
    """
    if not hasattr(config, "workerinput"):
        config.stash[EXTENSIONS] = os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="torch-extensions-")


def pytest_unconfigure(config):
    if EXTENSIONS in config.stash:
        shutil.rmtree(config.stash[EXTENSIONS], ignore_errors=True)


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
    from attn_trainers.tiny.arithmetic import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folder of a random two-layer Qwen2 with the arithmetic tokenizer."""
    import torch

    from attn_trainers.tiny.arithmetic import build_model

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    build_model(tiny_tokenizer, hidden_size=64, num_layers=2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_sharp_model(tmp_path_factory, tiny_tokenizer):
    """Saves a random Qwen2 whose attention differs between tokens and heads, with its tokenizer."""
    import torch

    from attn_trainers.tiny.arithmetic import build_model

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
    from attn_trainers.tiny.arithmetic import sample_problems
    from attn_trainers.tiny.runs import to_dataset

    return to_dataset(sample_problems(24, seed=0))


@pytest.fixture
def bars(monkeypatch):
    """The bars that trainers show, as on a terminal."""
    from tqdm import tqdm

    shown = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, file=Terminal(), mininterval=0, **kwargs)  # drawn at each step
            if not self.disable:
                shown.append(self)

    monkeypatch.setattr("attn_trainers.base.progress.tqdm", Bar)
    monkeypatch.setattr("attn_trainers.base.progress.sys", SimpleNamespace(stderr=Terminal()))
    return shown


@pytest.fixture
def environment() -> dict[str, str]:
    """`outside_environment`, for a test that starts a process of its own."""
    return outside_environment()


@pytest.fixture(scope="session")
def launch():
    """`launch_script`, for tests of several ranks and of whole recipes."""
    return launch_script


@pytest.fixture(scope="session")
def run_ranks(launch):
    """Runs a training script on some ranks and returns what it wrote to its output file, and its final weights.

    What follows the kind of generation goes to the script as it is.
    """
    from safetensors.torch import load_file

    def run(script: str, config: str, num_ranks: int, model_dir: Path, folder: Path, generation: str, *more: str):
        output = folder / f"{config}-{generation}.json"
        launch(config, ROOT / "tests" / "distributed" / script, model_dir, output, num_ranks, generation, *more)
        return json.loads(output.read_text()), load_file(output.with_suffix("") / "model.safetensors")

    return run
