"""Which runs fit on which GPU, by the preflight's own estimate (docs/memory.md).

    python benchmarks/memory_table.py

A cell is the estimated peak per GPU with the smallest `vllm_gpu_memory_utilization` (in steps of 0.05) whose KV cache
holds 16 full rows, or `-` where no value leaves room for the rest.
"""

from dataclasses import replace

from transformers import Qwen2Config, Qwen3Config

from attn_trainers.launch.memory import DEVICE_OVERHEAD, GIB, ModelShape, Sharding, TrainingSetup, estimate_memory
from attn_trainers.tables import markdown_table


# Memory that the driver reports, in GiB, of cards sold as 24, 40, 48, 80 and 141 GB.
DEVICES = {"24 GB": 23.6, "40 GB": 39.4, "48 GB": 44.4, "80 GB": 79.2, "141 GB": 139.8}
MODELS = {
    "R1-Distill-1.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    "Qwen3-4B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "R1-Distill-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
CACHED_ROWS = 16
LORA_RANK = 32


def setups(model: str, shape: ModelShape) -> dict[str, TrainingSetup]:
    """Ways to train a model, with the rows of its recipe."""
    micro_batch, row_tokens = (4, 2048) if model == "Qwen3-4B" else (2, 9216)
    full = TrainingSetup(Sharding(), micro_batch, row_tokens, has_reference=model != "Qwen3-4B")
    lora = replace(full, has_reference=False, weight_bytes=2, adapter_parameters=shape.lora_parameters(LORA_RANK))
    sharded = {stage: replace(full, sharding=Sharding(8, "deepspeed", stage)) for stage in (2, 3)}
    return {
        "LoRA, 1 GPU": lora,
        "LoRA, 1 GPU, 1 row": replace(lora, micro_batch=1),
        "full, 1 GPU": full,
        "full, 1 GPU, vLLM sleeps": replace(full, vllm_sleeps=True),
        "full, 8 GPUs, ZeRO-2": sharded[2],
        "full, 8 GPUs, ZeRO-3": sharded[3],
        "full, 8 GPUs, ZeRO-3, 1 row, vLLM sleeps": replace(sharded[3], micro_batch=1, vllm_sleeps=True),
    }


def cell(shape: ModelShape, setup: TrainingSetup, device_memory: float) -> str:
    """Peak and share of vLLM on a device, or `-`."""
    for twentieths in range(1, 19):
        setup = replace(setup, vllm_share=twentieths / 20)
        estimate = estimate_memory(shape, setup, device_memory)
        peak = estimate.peak + DEVICE_OVERHEAD
        if estimate.kv_tokens >= CACHED_ROWS * setup.row_tokens:
            return f"{peak / GIB:.0f} ({setup.vllm_share:.2f})" if peak <= device_memory else "-"
    return "-"


def table() -> str:
    """The table in Markdown."""
    rows = []
    for model, config in MODELS.items():
        shape = ModelShape.from_config(config)
        for name, setup in setups(model, shape).items():
            cells = [cell(shape, setup, size * GIB) for size in DEVICES.values()]
            rows.append([model, f"{setup.micro_batch} x {setup.row_tokens}", name, *cells])
    return markdown_table(["model", "micro-batch", "training", *DEVICES], rows)


if __name__ == "__main__":
    print(table())
