"""GRPO, TreeRL's branching and AttnRL on one small model, GSM8K and one GPU, with as many rows for each.

    python -c "from datasets import load_dataset
    for split in ('train', 'test'):
        rows = load_dataset('openai/gsm8k', 'main', split=split)
        rows = rows.map(lambda r: {'problem': r['question'], 'answer': r['answer'].split('####')[1].strip()})
        rows.select_columns(['problem', 'answer']).to_json(f'gsm8k_{split}.jsonl')"
    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/attnrl_gsm8k.py --setting attnrl

`--setting` chooses the method (`SETTINGS`): each has 8 leaves a prompt, and any field that it decides can be set on
the command line as well. With LoRA: `--use_peft --lora_r 32 --lora_alpha 64 --learning_rate 1e-5`. A run that was cut
off goes on when it is launched again. `recipes/evaluate.py --model runs/attnrl_gsm8k/attnrl --data gsm8k_test.jsonl`
gives the accuracy afterwards. Published elsewhere for Qwen2.5-0.5B-Instruct on GSM8K (arXiv 2602.14169): GRPO with 8
rollouts 64.1, TreeRL 65.5, AttnRL 67.0 %; its other settings are not known here.

All three run in AttnRL's pipeline with its loss: "grpo" has the mean of a prompt's rollouts as baseline and is not
divided by their deviation. The model writes no thinking tags, so that steps are those of the whole answer. Its answers
are short: steps are sentences (paragraphs would make attention branch at the first steps whatever it says), and branch
points stand at least 30 tokens from the start: without that two in three are the first step (docs/branching.md).
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.base.options import check_choices
from attn_trainers.launch.recipe import HAS_CUDA, MathScriptArguments, parse, train
from attn_trainers.rewards import math_accuracy_reward


TREE = {"num_rollouts": 4, "num_branch_points": 1, "rollouts_per_branch": 1}  # 8 leaves
# What is AttnRL's alone: the filter, more branches for harder prompts, more prompts where few carry signal, and
# sampling ahead.
PLAIN = {
    "filter_easy_prompts": False,
    "expansion": "uniform",
    "max_prompt_batch_factor": 1.0,
    "off_policy": False,
}
ADAPTIVE = {"filter_easy_prompts": True, "expansion": "ceil", "max_prompt_batch_factor": 4.0, "off_policy": True}
SETTINGS: dict[str, dict[str, object]] = {
    "grpo": {"num_rollouts": 8, "num_branch_points": 0, "rollouts_per_branch": 1, "branching": "random"} | PLAIN,
    "treerl": TREE | {"branching": "entropy"} | PLAIN,
    "attnrl": TREE | {"branching": "attention"} | ADAPTIVE,
}


@dataclass
class Script(MathScriptArguments):
    """The data: lines of `problem` and `answer`."""

    dataset: str = field(default="gsm8k_train.jsonl", metadata={"help": "Local file (JSONL, JSON, Parquet, CSV)."})


@dataclass
class Recipe(AttnRLConfig):
    """Settings of this run; those not named here are the defaults of `AttnRLConfig`.

    Raises:
        ValueError: for an unknown setting.
    """

    setting: str = field(default="attnrl", metadata={"help": f"The method: {', '.join(SETTINGS)}."})
    num_rollouts: int | None = field(default=None, metadata={"help": "Initial rollouts. Default: the setting's."})
    num_branch_points: int | None = field(default=None, metadata={"help": "Branch points. Default: the setting's."})
    rollouts_per_branch: int | None = field(default=None, metadata={"help": "Continuations. Default: the setting's."})
    branching: str | None = field(default=None, metadata={"help": "Where to branch. Default: the setting's."})
    filter_easy_prompts: bool | None = field(default=None, metadata={"help": "Default: the setting's."})
    expansion: str | None = field(default=None, metadata={"help": "Default: the setting's."})
    max_prompt_batch_factor: float | None = field(default=None, metadata={"help": "Default: the setting's."})
    off_policy: bool | None = field(default=None, metadata={"help": "Default: the setting's."})

    output_dir: str | None = None  # runs/attnrl_gsm8k/SETTING
    step_mode: str = "sentences"
    min_branch_spacing: int = 30
    learning_rate: float = 1e-6
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 8
    generation_batch_size: int | None = 512  # 64 prompts x 8 leaves, in 4 updates of 128 rows
    max_steps: int = 400
    max_completion_length: int | None = 512
    use_vllm: bool = True
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = 1024
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 4
    save_steps: float = 100
    save_total_limit: int | None = 2

    def __post_init__(self):
        check_choices(self, {"setting": tuple(SETTINGS)})
        self.output_dir = self.output_dir or f"runs/attnrl_gsm8k/{self.setting}"
        for name, value in SETTINGS[self.setting].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()


@dataclass
class Model(ModelConfig):
    """The model that is trained."""

    model_name_or_path: str | None = "Qwen/Qwen2.5-0.5B-Instruct"
    dtype: str | None = "float32"  # bf16 weights would lose updates of this size; autocast computes in bf16


def main(script: Script, args: Recipe, model: Model) -> None:
    """Train the setting."""
    train(AttnRLTrainer, math_accuracy_reward, script, args, model)


if __name__ == "__main__":
    main(*parse(Script, Recipe, Model))
