"""Checkpoints at generation boundaries, and method state beside them.

A generation batch is trained on in several optimizer steps. A checkpoint in the middle of a batch does not hold its
samples, so that they would be drawn anew on resume, from another policy: checkpoints are made between batches only.
"""

import json
from pathlib import Path

import torch
from transformers.trainer_utils import SaveStrategy
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler


def steps_between_generations(args: GRPOConfig) -> int:
    """Optimizer steps after which a generation batch ends on an update, i.e. after which a checkpoint is whole."""
    generate_every = args.steps_per_generation * args.num_iterations
    accumulation = args.gradient_accumulation_steps
    steps = 1
    while steps * accumulation % generate_every != 0:
        steps += 1
    return steps


def restart_order(sampler: RepeatSampler, epoch: int) -> None:
    """Have TRL's sampler draw next the order of an epoch, counted from 0.

    It draws one order after another from one generator, so that a resumed run would take up epoch 0's.
    """
    if sampler.shuffle and sampler.seed is not None:
        sampler.generator.manual_seed(sampler.seed)
        for _ in range(epoch):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def check_save_interval(args: GRPOConfig) -> None:
    """Refuse a save interval that is off the generation boundary.

    Raises:
        ValueError: names the field, its value and the next valid value.
    """
    interval = steps_between_generations(args)
    fields = []
    if args.save_strategy == SaveStrategy.STEPS:
        fields.append("save_steps")
    if args.save_strategy == SaveStrategy.BEST or args.load_best_model_at_end:
        fields.append("eval_steps")
    for name in fields:
        value = getattr(args, name)
        if value is None or value >= 1 and value % interval != 0:
            valid = interval * max(1, -(-int(value or 1) // interval))
            raise ValueError(
                f"{name}={value} is off the generation boundary: a generation batch takes {interval} optimizer steps "
                f"(steps_per_generation={args.steps_per_generation}, num_iterations={args.num_iterations}, "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}), and a checkpoint inside it would "
                f"repeat its prompts on resume. Set {name} to {valid} or another multiple of {interval}."
            )
        if 0 < value < 1:
            raise ValueError(
                f"{name}={value} is a share of the run, which may fall inside a generation batch; set it to a number "
                f"of steps, a multiple of {interval}."
            )


def write_state(checkpoint: str | Path, name: str, state: dict) -> None:
    """Write a method's state as JSON beside the weights; whole or not at all."""
    path = Path(checkpoint) / f"{name}_state.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state, indent=2))
    partial.replace(path)


def read_state(checkpoint: str | Path, name: str) -> dict | None:
    """The state written by `write_state`, or `None` where there is none."""
    path = Path(checkpoint) / f"{name}_state.json"
    return json.loads(path.read_text()) if path.exists() else None
