"""AttnPO on DeepSeek-R1-Distill-Qwen-1.5B and DeepScaleR, with the published settings for one node of 8 GPUs.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/attnpo_1p5b.py

Any field can be set on the command line or in a YAML file (`--config FILE`). On one GPU with LoRA:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/attnpo_1p5b.py \\
        --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 2e-5 --gradient_accumulation_steps 64

Another model needs its own heads: `attn-trainers heads` finds them, `--heads FILE` takes them.
`--attenuate_positive false --protect_negative false` is the baseline, TLMRE. A run that was cut off goes on from its
last checkpoint when it is launched again. `--push_to_hub` publishes the result.

A generation batch holds 128 prompts x 8 responses = 1024 rows (`per_device_train_batch_size` x GPUs x
`gradient_accumulation_steps`), trained on in one update.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from attn_trainers import AttnPOConfig, AttnPOTrainer
from attn_trainers.attnpo.rewards import get_closed_thinking_accuracy_reward
from attn_trainers.launch.recipe import HAS_CUDA, MathScriptArguments, parse, train


@dataclass
class Script(MathScriptArguments):
    """The data: problems as they are, without an added instruction."""

    prompt_template: str = field(
        default="{problem}", metadata={"help": "User message; {problem} stands for the problem."}
    )


@dataclass
class Recipe(AttnPOConfig):
    """Settings of this run; those not named here are the defaults of `AttnPOConfig`."""

    output_dir: str | None = "runs/attnpo_1p5b"
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 64
    max_steps: int = 1000  # the length of the published schedule
    use_vllm: bool = True
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = 17408
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 1
    page_steps: int = 20
    save_steps: float = 10
    save_total_limit: int | None = 3


@dataclass
class Model(ModelConfig):
    """The model that is trained."""

    model_name_or_path: str | None = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    dtype: str | None = "float32"  # bf16 weights would lose updates of this size; autocast computes in bf16


def main(script: Script, args: Recipe, model: Model) -> None:
    """Train; the tiny model has no known heads, so that two of its heads stand in."""
    if script.tiny_model and args.heads is None:
        args.heads = [[0, 0], [1, 0]]
    reward = get_closed_thinking_accuracy_reward(args.end_of_thinking, args.answer)
    train(AttnPOTrainer, reward, script, args, model)


if __name__ == "__main__":
    main(*parse(Script, Recipe, Model))
