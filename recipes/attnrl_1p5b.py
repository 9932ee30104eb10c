"""AttnRL on DeepSeek-R1-Distill-Qwen-1.5B and DeepScaleR, with the published settings for one node of 8 GPUs.

    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/attnrl_1p5b.py

Any field can be set on the command line or in a YAML file (`--config FILE`). On one GPU with LoRA:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/attnrl_1p5b.py \\
        --use_peft --lora_r 32 --lora_alpha 64 --learning_rate 1e-5 --generation_batch_size 240

`--credit rhythm --scheme coupled` trains on the trees with Rhythm's factors, `--credit attnpo` with AttnPO's; each
setting of the credit is an option too. A run that was cut off goes on from its last checkpoint when it is launched
again. `--push_to_hub` publishes the result. A generation batch holds 64 prompts x 30 leaves = 1920 rows, trained on in
10 updates of 192 rows (`per_device_train_batch_size` x GPUs x `gradient_accumulation_steps`).
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.base.credit import CreditMethod
from attn_trainers.launch.branching import sample_report
from attn_trainers.launch.recipe import HAS_CUDA, MathScriptArguments, parse_with_credit, refusal_in_a_line, train
from attn_trainers.rewards import math_accuracy_reward


@dataclass
class Script(MathScriptArguments):
    """The data, and completions to look at before the run."""

    branching_sample: str | None = field(
        default=None,
        metadata={
            "help": "JSON lines with 'problem' and 'completion' of the model: says what attention branching has to "
            "choose from in them, before the run or with --preflight alone."
        },
    )


@dataclass
class Recipe(AttnRLConfig):
    """Settings of this run; those not named here are the defaults of `AttnRLConfig`."""

    output_dir: str | None = "runs/attnrl_1p5b"
    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 12
    generation_batch_size: int | None = 1920
    max_steps: int = 5000  # 500 training steps of 10 updates
    use_vllm: bool = True
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = 9216
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 10
    save_steps: float = 100
    save_total_limit: int | None = 3


@dataclass
class Model(ModelConfig):
    """The model that is trained."""

    model_name_or_path: str | None = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    dtype: str | None = "float32"  # bf16 weights would lose updates of this size; autocast computes in bf16


def main(script: Script, args: Recipe, model: Model, credit: CreditMethod | None) -> None:
    """Look at the sample, if there is one, and train."""
    if script.branching_sample:
        with refusal_in_a_line():
            name = model.model_name_or_path
            print(sample_report(args, name, script.branching_sample, script.prompt_template))
    train(AttnRLTrainer, math_accuracy_reward, script, args, model, credit)


if __name__ == "__main__":
    main(*parse_with_credit(Script, Recipe, Model))
