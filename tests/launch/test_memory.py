"""The memory estimate against what is allocated, and against closed forms."""

import runpy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from attn_trainers.launch.memory import GIB, ModelShape, Sharding, TrainingSetup, checkpoint_bytes, estimate_memory
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.tiny.byte_model import build_byte_model
from tests.helpers import ROOT


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}
CONFIGS = {
    "qwen2": Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **SIZES),
    "qwen2-tied": Qwen2Config(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, **SIZES),
    "qwen3": Qwen3Config(num_attention_heads=4, num_key_value_heads=1, head_dim=32, **SIZES),
    "llama": LlamaConfig(num_attention_heads=8, **SIZES),
}
SHAPE = ModelShape(1000, 3, 64, 96, 4, 2, 16, 50)


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_counts_parameters_cache_and_adapter(name):
    config = CONFIGS[name]
    shape = ModelShape.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert shape.layer_parameters == matrices
    cache = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    assert 7 * shape.kv_bytes(4) == sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert shape.lora_parameters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_state_is_what_a_training_run_holds(tmp_path, lora):
    folder = build_byte_model(tmp_path / "model")
    args = GRPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_steps=1,
        max_completion_length=4,
        beta=0.0 if lora else 0.1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="steps",
        save_steps=1,
    )
    trainer = GRPOTrainer(
        str(folder),
        lambda completions, **kwargs: [float(i) for i in range(len(completions))],
        args,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 4),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if lora else None,
    )
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    setup = TrainingSetup(
        Sharding(), 4, 8, 4, 4, sum(p.numel() for p in trained) if lora else 0, has_reference=not lora
    )
    shape = ModelShape.from_config(trainer.model.config)
    state = estimate_memory(shape, setup, GIB).state
    assert state["weights"] == sum(p.nbytes for p in trainer.model.parameters())
    assert state["gradients"] == sum(p.nbytes for p in trained)  # as many numbers as parameters
    moments = [v for s in trainer.optimizer.state.values() for v in s.values() if v.dim() > 0]
    assert state["optimizer"] == sum(v.nbytes for v in moments)
    reference = 0 if lora else sum(p.nbytes for p in trainer.ref_model.parameters())
    assert state.get("reference model", 0) == reference
    checkpoint = tmp_path / "out" / "checkpoint-1"
    files = [*checkpoint.glob("*.safetensors"), checkpoint / "optimizer.pt"]
    written = sum(file.stat().st_size for file in files)
    assert checkpoint_bytes(shape, setup) <= written < checkpoint_bytes(shape, setup) + 60_000  # names and steps


def test_sharding_divides_state():
    def state(engine, stage, ranks=4, **kwargs):
        setup = TrainingSetup(Sharding(ranks, engine, stage, **kwargs), 1, 8, has_reference=True)
        return estimate_memory(SHAPE, setup, GIB).state

    assert state("none", 0) == {"weights": 4000, "reference model": 4000, "gradients": 8000, "optimizer": 8000}
    buckets = 2 * 2 * 1000
    assert state("deepspeed", 2) == {
        "weights": 2000,
        "reference model": 2000,
        "gradients": 500 + buckets,
        "optimizer": 3000,
    }
    assert state("deepspeed", 3) == {
        "weights": 500,
        "reference model": 500,
        "gradients": 500 + buckets,
        "optimizer": 3000,
    }
    assert state("deepspeed", 3, offload=True)["optimizer"] == 0
    assert state("fsdp", 3) == {"weights": 1000, "reference model": 1000, "gradients": 1000, "optimizer": 2000}
    assert state("deepspeed", 2, ranks=1)["gradients"] == 2000


def test_activations_follow_tokens_layers_and_checkpointing():
    def activations(**kwargs):
        setup = TrainingSetup(Sharding(), **({"micro_batch": 1, "row_tokens": 10} | kwargs))
        return estimate_memory(SHAPE, setup, GIB).training["activations"]

    layer = 10 * (4 * 4 * 64 + 2 * (2 * 64 + 2 * 64 + 4 * 32 + 4 * 96))
    assert activations() == 10 * 4 * 64 * 3 + 2 * layer
    assert activations(gradient_checkpointing=False) == 4 * layer
    assert activations(micro_batch=3) == 3 * activations() == activations(row_tokens=30)


def test_vllm_share_and_cache():
    shape = ModelShape.from_config(CONFIGS["qwen2"])
    setup = TrainingSetup(Sharding(), 1, 8, vllm_share=0.5)
    awake = estimate_memory(shape, setup, 10 * GIB)
    assert awake.engine == 5 * GIB and awake.generation == {}
    assert awake.kv_tokens == (5 * GIB - 2 * shape.num_parameters - 2 * GIB) // shape.kv_bytes(2)
    asleep = estimate_memory(shape, TrainingSetup(Sharding(), 1, 8, vllm_share=0.5, vllm_sleeps=True), 10 * GIB)
    assert asleep.engine == 0 and asleep.generation == {"vLLM": 5 * GIB}
    assert asleep.peak == sum(asleep.state.values()) + 5 * GIB
    assert awake.peak == awake.certain + sum(awake.training.values())
    assert estimate_memory(shape, TrainingSetup(Sharding(), 1, 8, vllm_share=0.1), GIB).kv_tokens == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Sharding(8)),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            Sharding(8, "deepspeed", 3),
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true"}, Sharding(8, "fsdp", 3)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(8, "fsdp", 2)),
    ],
)
def test_sharding_from_what_accelerate_sets(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Sharding.from_environment(8) == expected


def test_the_documented_table_is_what_the_command_prints():
    table = runpy.run_path(str(ROOT / "benchmarks" / "memory_table.py"))["table"]()
    assert table in (ROOT / "docs" / "memory.md").read_text()
