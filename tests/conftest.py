"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
def arithmetic_dataset():
    """24 problems with conversational prompts and answers."""
    from attn_trainers.arithmetic import sample_problems
    from attn_trainers.tiny import to_dataset

    return to_dataset(sample_problems(24, seed=0))
