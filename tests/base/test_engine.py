"""In what a colocated engine computes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attn_trainers.base.engine import engine_dtype, trained_dtype


FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def settings(dtype="auto", bf16=False, fp16=False):
    return SimpleNamespace(vllm_dtype=dtype, bf16=bf16, fp16=fp16)


@pytest.mark.parametrize(
    ("weights", "args", "expected"),
    [
        (FLOAT32, settings(), FLOAT32),
        (BFLOAT16, settings(), BFLOAT16),
        (FLOAT32, settings(bf16=True), BFLOAT16),
        (FLOAT32, settings(fp16=True), FLOAT16),
    ],
)
def test_mixed_precision_is_what_the_trainer_computes_in(weights, args, expected):
    assert trained_dtype(nn.Linear(2, 2, dtype=weights), args) == expected


@pytest.mark.parametrize(
    ("capabilities", "weights", "args", "device", "expected"),
    [
        ({"avx2": True}, FLOAT32, settings(), "cpu", "float32"),
        ({"avx512_bf16": True}, FLOAT32, settings(), "cpu", "float32"),  # not vLLM's choice, bfloat16
        ({"avx512_bf16": True}, FLOAT32, settings(bf16=True), "cpu", "bfloat16"),
        ({"avx512_bf16": False}, FLOAT32, settings(bf16=True), "cpu", "float32"),
        ({"avx2": True}, BFLOAT16, settings(), "cpu", "float32"),
        ({"bf16": True}, BFLOAT16, settings(), "cpu", "bfloat16"),  # Arm
        ({"avx2": True}, FLOAT32, settings("bfloat16"), "cpu", "bfloat16"),
        ({"avx2": True}, FLOAT32, settings(), "cuda", "auto"),
        ({"avx2": True}, FLOAT32, settings("float16"), "cuda", "float16"),
    ],
)
def test_an_engine_on_a_cpu_computes_in_what_the_trainer_does(
    monkeypatch, capabilities, weights, args, device, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert engine_dtype(nn.Linear(2, 2, dtype=weights), args, torch.device(device)) == expected
