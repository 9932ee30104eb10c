"""The warm start on dependency arithmetic: its heads before any training, its batches, its cache."""

import pytest
import torch

from attn_trainers.tiny.dependencies import build_dependency_tokenizer
from attn_trainers.tiny.dependency_start import (
    DependencyStart,
    _batches,
    build_dependency_model,
    dependency_warm_start,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_dependency_tokenizer()


def attentions(tokenizer, text):
    torch.manual_seed(0)
    model = build_dependency_model(tokenizer)
    model.set_attn_implementation("eager")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return ids[0].tolist(), model(ids, output_attentions=True).attentions


def test_heads_look_back_and_look_up_before_any_training(tokenizer):
    text = " m2; a4; k3; c a + b; b9; c?<think> c a"
    ids, layers = attentions(tokenizer, text)
    for back in (1, 2, 3):
        assert layers[0][0, back - 1].diagonal(-back).min() > 0.8
    # Most of a look-up's attention at the last token, ` a`, goes to what stands behind the earlier ones: `4` and ` +`.
    followers = [ids.index(tokenizer.convert_tokens_to_ids(word)) for word in ("4", " +")]
    for head in (0, 1):
        assert layers[1][0, head, -1, followers].sum() > 0.5


def test_batches_are_of_solutions_and_grow(tokenizer):
    settings = DependencyStart(steps=20, batch_tokens=1024)
    batches = list(_batches(settings, tokenizer, exclude=set()))
    assert len(batches) == 20 and batches[0]["input_ids"].shape[1] < batches[-1]["input_ids"].shape[1]
    for batch in batches:
        assert batch["input_ids"].numel() <= 1024 or len(batch["input_ids"]) == 2
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(labels[labels >= 0])
            assert torch.equal(labels[labels >= 0], ids[labels >= 0])
            assert "<think>" not in text and text.count("</think>") == 1 and text.endswith("}<eos>")


def test_it_is_cached(tmp_path):
    settings = DependencyStart(steps=2, batch_tokens=256)
    state = torch.get_rng_state()
    folder = dependency_warm_start(settings, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dependency_warm_start(settings, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert DependencyStart(steps=3, batch_tokens=256).key != settings.key
