"""Models that cannot be packed, and why."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from attn_trainers.packing import can_pack, pack_rows, packed_forward, packed_logps


@pytest.fixture
def build_bare(sizes):
    """Builds a model of an architecture without weights."""

    def build(name: str, **overrides):
        config = AutoConfig.for_model(name, **{**sizes, "pad_token_id": 0, **overrides})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    return build


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("gemma2", {"head_dim": 8}, "attn_logit_softcapping"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 2}, "attention sinks"),
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2}, "chunked_attention layers"),
        ("mamba", {}, "does not hand keyword arguments on"),
        ("bloom", {}, "does not hand keyword arguments on"),
        ("recurrent_gemma", {}, "recurrent state"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("gpt2", {"n_head": 4, "n_embd": 32, "n_layer": 2}, "attn_pdrop=0.1"),
        ("qwen3_moe", {"num_experts": 2, "head_dim": 8, "output_router_logits": True}, "output_router_logits=True"),
    ],
)
def test_reasons(build_bare, name, overrides, reason):
    assert reason in can_pack(build_bare(name, **overrides))


def test_no_plain_decoder():
    with torch.device("meta"):
        assert "multimodal" in can_pack(Qwen2VLForConditionalGeneration(Qwen2VLConfig()))
        assert "encoder" in can_pack(T5ForConditionalGeneration(T5Config(num_layers=1, d_model=16, d_ff=8)))
    assert "no transformers model" in can_pack(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("tuning", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning(build_model, tuning):
    import peft

    config = getattr(peft, tuning)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "prompt learning" in can_pack(peft.get_peft_model(build_model("qwen2"), config))


def test_unknown_implementation(build_model):
    model = build_model("qwen2")
    model.config._attn_implementation = "paged|sdpa"
    assert "paged|sdpa" in can_pack(model)


def test_packed_logps_says_why_not(build_model):
    model = build_model("qwen2", attention_dropout=0.1)
    with pytest.raises(ValueError, match="cannot be packed: attention_dropout=0.1"):
        packed_logps(model, [[1, 2, 3]], [1])


def test_a_layer_that_reads_no_tree_is_an_error(build_model):
    """A mixer of another kind would mix the rows: it is noticed though its values look like any other."""
    model = build_model("qwen2")

    class Mixer(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states.cumsum(dim=1), None

    model.model.layers[1].self_attn = Mixer()
    with pytest.raises(ValueError, match="1 of 2 layers read the packed row"):
        packed_forward(model, pack_rows([[1, 2, 3]], [1]))


def test_odd_arguments_are_errors(build_model):
    model = build_model("qwen2", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="uses dropout"):
        packed_forward(model, pack_rows([[1, 2, 3]], [1]))
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="uses is_causal=False"):
        packed_forward(model.eval(), pack_rows([[1, 2, 3]], [1]))
