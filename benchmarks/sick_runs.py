"""Runs that are sick on purpose, beside a healthy one: the curves of docs/metrics.md.

    python benchmarks/sick_runs.py --output_dir runs/sick

The tiny model learns arithmetic with AttnRL for a few dozen updates; each sick run has one thing wrong. The output
folder gets `sick_runs.png` and the logs of all runs; those that are there are not run again.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.plots import plot_curves
from attn_trainers.tiny.runs import TinyArguments, exact_answer_reward, prepare, to_dataset


@dataclass
class Arguments(TinyArguments):
    """What is run."""

    output_dir: str = field(default="runs/sick", metadata={"help": "Where logs and the picture go."})
    max_steps: int = field(default=40, metadata={"help": "Updates of each run."})


def small_answer_reward(completions, **kwargs) -> list[float]:
    """Pays for answers of one digit, right or wrong."""
    return [float(bool(re.search(r"\\boxed\{\d\}$", completion[0]["content"]))) for completion in completions]


def unread_answer_reward(completions, **kwargs) -> list[float]:
    """A reward that cannot read the answers, as where the data set writes them otherwise than the reward expects."""
    return [0.0 for _ in completions]


# Reward functions, and what is set otherwise. A step without a row to train on takes five batches: few of them do.
RUNS = {
    "healthy": ([exact_answer_reward], {}),
    "learning rate × 30": ([exact_answer_reward], {"learning_rate": 1e-2, "max_steps": 12}),
    "wrong reward": ([exact_answer_reward, small_answer_reward], {"reward_weights": [0.0, 1.0]}),
    "unread answers": ([unread_answer_reward], {"max_steps": 8}),
}
PANELS = {
    "reward": "reward",
    "rewards/exact_answer_reward/mean": "rewards/exact_answer_reward/mean",
    "completions/mean_length": "completions/mean_length",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "attnrl/valid_ratio": "attnrl/valid_ratio",
    "attnrl/solve_none_ratio": "attnrl/solve_none_ratio",
    "attnrl/ratio_deviation_initial": "attnrl/ratio_deviation_initial",
    "attnrl/rows_trained": "attnrl/rows_trained",
}


def train(name: str, args: Arguments) -> list[dict]:
    """The log of a run."""
    rewards, settings = RUNS[name]
    model, tokenizer, training, _ = prepare(args)
    config = {
        "num_rollouts": 4,
        "rollouts_per_branch": 1,
        "per_device_train_batch_size": 60,
        "gradient_accumulation_steps": 2,
        "generation_batch_size": 120,
        "learning_rate": 3e-4,
        "max_steps": args.max_steps,
        "max_completion_length": 48,
        "min_branch_spacing": 0,
        "influence_delta": 2,
        "seeded_sampling": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    trainer = AttnRLTrainer(
        str(model),
        rewards,
        AttnRLConfig(args.output_dir, **config | settings),
        train_dataset=to_dataset(training),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


def main(args: Arguments) -> None:
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    logs = output / "logs.json"
    histories = json.loads(logs.read_text()) if logs.exists() else {}
    for name in RUNS:
        if name not in histories:
            histories[name] = train(name, args)
            logs.write_text(json.dumps(histories, indent=1))
    shown = {name: histories[name] for name in RUNS}
    plot_curves(shown, PANELS, output / "sick_runs.png", "AttnRL on arithmetic: one thing wrong in each run")
    print(f"Curves and logs: {output}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
