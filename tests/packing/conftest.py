"""Small models of the architectures that packed rows are checked on, and rows one by one as the truth."""

import pytest
import torch


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
SHAPES = {
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 7, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def build_model():
    """Builds a random model of a shape in `SHAPES`, whose attention differs between tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(shape: str, **overrides):
        torch.manual_seed(0)
        name = shape.partition("-")[0]
        config = AutoConfig.for_model(name, **{**SIZES, **SHAPES[shape], **overrides})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(12)
        return model.eval()

    return build


@pytest.fixture
def tree_rows() -> tuple[list[list[int]], list[int]]:
    """Rows of two prompts with shared prefixes of every kind, and where their completions start."""
    random = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 61, (count,), generator=random).tolist()

    prompt, rollout = tokens(6), tokens(24)
    rows = [prompt + rollout]
    rows += [prompt + rollout[:8] + tokens(10), prompt + rollout[:8] + tokens(13)]
    rows += [prompt + rollout[:15] + tokens(1), prompt + rollout[:15] + tokens(7)]
    rows += [prompt + rollout]  # shares all
    rows += [prompt + rollout[:11]]  # a prefix of another
    rows += [prompt[:1] + tokens(9)]  # shares one token
    rows += [[0] + tokens(12)]  # shares nothing
    rows += [[1] + tokens(1)]  # one token of completion
    return rows, [6] * 7 + [4, 5, 1]


@pytest.fixture(scope="module")
def shape_models(build_model):
    """One model of every shape, for tests that only read it."""
    return {shape: build_model(shape) for shape in SHAPES}
