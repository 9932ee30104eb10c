"""Which LoRA travels to vLLM as an adapter, and what the field for it takes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from trl.generation import vllm_generation as trl_vllm

from attn_trainers.base import adapter_sync
from attn_trainers.base.adapter_sync import adapter_hindrance, check_tied_ends, lora_hindrance
from attn_trainers.base.config import LORA_SYNCS, MethodConfig
from attn_trainers.base.engine import engine_settings
from attn_trainers.tiny.arithmetic import build_model


@pytest.mark.parametrize(
    ("settings", "hindrance"),
    [
        ({}, None),
        ({"r": 64, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}, None),
        ({"layers_to_transform": [0], "init_lora_weights": "gaussian"}, None),
        ({"use_dora": True}, "use_dora=True is not known to vLLM"),
        ({"modules_to_save": ["norm"]}, "modules_to_save="),
        ({"bias": "lora_only"}, "bias='lora_only' is not known"),
        ({"lora_bias": True}, "lora_bias=True is not known"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base model"),
        ({"r": 513}, "r=513 is above 512"),
    ],
)
def test_what_vllm_would_ignore_in_a_lora_is_found(settings, hindrance):
    found = lora_hindrance(LoraConfig(target_modules=["q_proj"], **settings))
    assert found is None if hindrance is None else found.startswith(hindrance)


def test_another_adapter_is_no_lora():
    assert lora_hindrance(IA3Config(target_modules=["q_proj"], feedforward_modules=[])) == "peft_type='IA3' is no LoRA"


@pytest.mark.parametrize(
    ("targets", "options", "is_sharded", "takes", "hindrance"),
    [
        ("all-linear", {"enable_sleep_mode": False}, False, True, None),
        (["lm_head", "q_proj"], {}, False, True, "it adapts the embeddings or the output head"),
        (["embed_tokens"], {}, False, True, "it adapts the embeddings or the output head"),
        (["q_proj"], {}, True, True, "FSDP shards it"),
        (["q_proj"], {"enable_sleep_mode": True}, False, True, "vllm_enable_sleep_mode=True discards"),
        (["q_proj"], {}, False, False, "vLLM takes no adapter for Qwen2ForCausalLM"),
        (None, {}, False, True, "the model has no adapter"),
    ],
)
def test_what_keeps_an_adapter_from_travelling(
    monkeypatch, tiny_tokenizer, targets, options, is_sharded, takes, hindrance
):
    monkeypatch.setattr(adapter_sync, "supports_lora", lambda architectures: takes)
    model = build_model(tiny_tokenizer, 64, 2)
    model.config.architectures = ["Qwen2ForCausalLM"]
    if targets is not None:
        model = get_peft_model(model, LoraConfig(target_modules=targets))
    found = adapter_hindrance(model, options, is_sharded)
    assert found is None if hindrance is None else found.startswith(hindrance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    ],
)
def test_an_adapter_that_parts_tied_embeddings_is_refused(tiny_tokenizer, settings, parts, tied):
    model = build_model(tiny_tokenizer, 64, 2, tie_word_embeddings=tied)
    check_tied_ends(model)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    if parts and tied:
        with pytest.raises(ValueError, match="lora_target_modules=.* adapt the embeddings or the output head"):
            check_tied_ends(model)
    else:
        check_tied_ends(model)


@pytest.mark.parametrize(
    ("lora_sync", "hindered", "built"),
    [
        ("auto", False, "adapter"),
        ("auto", True, "plain"),
        ("adapter", False, "adapter"),
        ("adapter", True, None),
        ("merged", False, "plain"),
    ],
)
def test_the_engine_is_built_for_the_way_that_was_chosen(
    monkeypatch, tiny_tokenizer, caplog, lora_sync, hindered, built
):
    made = []
    monkeypatch.setattr(trl_vllm, "LLM", lambda **options: made.append(("plain", options)), raising=False)
    monkeypatch.setattr(adapter_sync, "adapter_llm", lambda: lambda **options: made.append(("adapter", options)))
    monkeypatch.setattr(adapter_sync, "supports_lora", lambda architectures: True)
    config = LoraConfig(r=9, target_modules=["q_proj"], use_dora=hindered)
    trainer = SimpleNamespace(
        model=get_peft_model(build_model(tiny_tokenizer, 64, 2), config),
        args=SimpleNamespace(lora_sync=lora_sync, vllm_dtype="auto", bf16=False, fp16=False),
        accelerator=SimpleNamespace(distributed_type="NO", device=torch.device("cpu")),
    )
    plain = trl_vllm.LLM
    with caplog.at_level(logging.INFO), engine_settings(trainer):
        if built is None:
            with pytest.raises(ValueError, match="lora_sync='adapter' does not go here \\(use_dora=True"):
                trl_vllm.LLM(model="m")
        else:
            trl_vllm.LLM(model="m")
    assert trl_vllm.LLM is plain
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 1} if built == "adapter" else {}
    assert made == ([] if built is None else [(built, {"model": "m", "dtype": "float32"} | lora)])
    reason = {"plain": "merged into the weights: " + ("use_dora=True" if hindered else "lora_sync='merged'")}
    assert (reason.get(built, "as an adapter") in caplog.text) is (built is not None)


def make_config(folder, **settings):
    common = {"per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "report_to": "none"}
    return MethodConfig(str(folder), **(common | settings))


@pytest.mark.parametrize("lora_sync", LORA_SYNCS)
@pytest.mark.parametrize("vllm_mode", ["colocate", "server"])
def test_every_value_is_taken_with_an_engine(tmp_path, lora_sync, vllm_mode):
    assert make_config(tmp_path, use_vllm=True, vllm_mode=vllm_mode, lora_sync=lora_sync).lora_sync == lora_sync


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_sync": "fused"}, "lora_sync='fused' is unknown; set it to one of auto, adapter, merged"),
        ({"lora_sync": "adapter"}, "lora_sync='adapter' does not go with use_vllm=False"),
        ({"vllm_dtype": "half"}, "vllm_dtype='half' is unknown; set it to one of auto, float32, bfloat16, float16"),
        ({"vllm_dtype": "float16"}, "vllm_dtype='float16' is for an engine in the trainer's own process"),
        (
            {"vllm_dtype": "float16", "use_vllm": True, "vllm_mode": "server"},
            "set it to 'auto' with use_vllm=True and vllm_mode='server' \\(a server has its own --dtype\\)",
        ),
    ],
)
def test_other_values_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)
