# /// script
# requires-python = ">=3.11"
# dependencies = ["attn_trainers[vllm]"]
# ///
"""AttnRL with LoRA on one GPU, as one file that brings its environment: for `uv run`, here or as a job on the Hub.

    uv run recipes/attnrl_uv.py --max_steps 100
    hf jobs uv run --flavor l40sx1 --secrets HF_TOKEN recipes/attnrl_uv.py --push_to_hub --hub_model_id ME/NAME

From a checkout, `uv build --wheel` and `uv run --find-links dist recipes/attnrl_uv.py` take the package from there. A
generation batch holds 8 prompts x 30 leaves = 240 rows, trained on in 10 updates of 24 rows. Any field can be set on
the command line or in a YAML file (`--config FILE`); `--preflight` only looks.
"""

from dataclasses import dataclass

from trl import ModelConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.launch.recipe import HAS_CUDA, MathScriptArguments, parse, train
from attn_trainers.rewards import math_accuracy_reward


@dataclass
class Recipe(AttnRLConfig):
    """Settings of this run; those not named here are the defaults of `AttnRLConfig`."""

    output_dir: str | None = "runs/attnrl_uv"
    learning_rate: float = 1e-5
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 12
    generation_batch_size: int | None = 240
    max_steps: int = 1000  # 100 training steps of 10 updates
    use_vllm: bool = True
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = 9216
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 2


@dataclass
class Model(ModelConfig):
    """The model that is trained, and its adapter."""

    model_name_or_path: str | None = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    dtype: str | None = "bfloat16"
    use_peft: bool = True
    lora_r: int = 32
    lora_alpha: int = 64


if __name__ == "__main__":
    train(AttnRLTrainer, math_accuracy_reward, *parse(MathScriptArguments, Recipe, Model))
