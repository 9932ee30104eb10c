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
    "gemma3_text": {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {  # values of another width than keys
        "first_k_dense_replace": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
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


@pytest.fixture
def flash_varlen():
    """FlashAttention's varlen function in plain torch: causal masks and windows end with each sequence's last key."""

    def attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        parts = []
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
        for query, key, value in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
            place = torch.arange(len(query))[:, None] + len(key) - len(query)
            distance = place - torch.arange(len(key))  # (queries, keys)
            hidden = (distance < 0) & (causal or window_size[1] == 0)
            if window_size[0] >= 0:
                hidden |= distance > window_size[0]
            scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, value))
        return torch.cat(parts)

    return attend


@pytest.fixture(scope="session")
def rows_alone():
    """Log-probs and entropies of each row in a forward of its own, by log_softmax."""

    def forward(model, rows, starts, temperature=1.0):
        logps, entropies = [], []
        for row, start in zip(rows, starts, strict=True):
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, start - 1 : -1].float()
            scores = (logits / temperature).log_softmax(dim=-1)  # (C, V)
            logps.append(scores.gather(-1, torch.tensor(row[start:], dtype=torch.long)[:, None]).squeeze(-1))
            entropies.append(-(scores.exp() * scores).sum(dim=-1))
        return logps, entropies

    return forward


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    """Sizes of a small decoder, as its config takes them."""
    return SIZES
