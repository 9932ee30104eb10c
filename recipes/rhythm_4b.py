"""Preplan-and-anchor credit on Qwen3-4B-Base and DAPO-Math-17k, with the paper's settings for one node of 8 GPUs.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/rhythm_4b.py

Any field can be set on the command line or in a YAML file (`--config FILE`): `--scheme none`, `random`, `entropy`,
`local` or `global` for the other rows of the paper's tables, `--preset paper_v1` for its first version, `--preset
rhythm_reward` for the rhythm reward, `--max_completion_length 8192 --vllm_max_model_length 9216` for the long setting.
On one GPU with LoRA:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/rhythm_4b.py \\
        --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 1e-5 --gradient_accumulation_steps 8

A run that was cut off goes on from its last checkpoint when it is launched again. `--push_to_hub` publishes the
result. A generation batch holds 64 prompts x 8 completions = 512 rows, trained on in 16 updates of 32 rows
(`per_device_train_batch_size` x GPUs x `gradient_accumulation_steps`). The paper does not state the group size, the
clip range and the loss's normalisation over a batch; 8, 0.2 and the mean per response are used.
"""

from dataclasses import dataclass

from trl import ModelConfig

from attn_trainers import RhythmConfig, RhythmTrainer
from attn_trainers.launch.recipe import HAS_CUDA, MathScriptArguments, parse, train
from attn_trainers.rewards import math_accuracy_reward


@dataclass
class Script(MathScriptArguments):
    """Data of this run."""

    dataset: str = "open-r1/DAPO-Math-17k-Processed"
    problem_column: str = "prompt"
    answer_column: str = "solution"
    prompt_template: str = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Recipe(RhythmConfig):
    """Settings of this run; those not named here are the defaults of `RhythmConfig`."""

    output_dir: str | None = "runs/rhythm_4b"
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    generation_batch_size: int | None = 512
    num_generations: int | None = 8
    max_steps: int = 8000  # 500 generation batches of 16 updates
    max_completion_length: int | None = 1024
    loss_type: str = "grpo"
    use_vllm: bool = True
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = 2048
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 16
    save_steps: float = 160
    save_total_limit: int | None = 3


@dataclass
class Model(ModelConfig):
    """The model that is trained."""

    model_name_or_path: str | None = "Qwen/Qwen3-4B-Base"
    dtype: str | None = "float32"  # bf16 weights would lose updates of this size; autocast computes in bf16


if __name__ == "__main__":
    train(RhythmTrainer, math_accuracy_reward, *parse(Script, Recipe, Model))
