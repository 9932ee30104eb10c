"""AttnRL on a CPU in minutes: a small Qwen2 learns multi-step arithmetic through the real stack.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/attnrl_tiny.py

A noisy teacher warm-starts the model (cached in `--cache_dir`); AttnRL then trains it under vLLM colocate and
evaluates it on held-out problems before and after. `--task dependencies` takes longer solutions in which it is known
which steps matter, so that `--branching oracle` can be compared with. Any field can be set on the command line, e.g.
`--branching random` or `--num_branch_points 0` (plain outcome RL) for a comparison on equal ground, `--credit rhythm`
for that credit on the trees, or `--use_vllm false`.

The output folder holds the model, its card, `results.md`, `results.json`, `curves.png` and `trees.png`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.base.card import CardNotes, public_command, publish
from attn_trainers.launch.command import refusal_in_a_line
from attn_trainers.launch.credits import build_credit, chosen_credit, credit_arguments
from attn_trainers.launch.recipe import HAS_CUDA
from attn_trainers.launch.tasks import parse_task
from attn_trainers.plots import plot_curves
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.runs import (
    HeldOutCurve,
    Stopwatch,
    TinyArguments,
    exact_answer_reward,
    prepare,
    show_in_bar,
    show_table,
    task_of,
    to_dataset,
    write_results,
)


@dataclass
class Recipe(AttnRLConfig):
    """Settings of the chain task; those not named here are the defaults of `AttnRLConfig`."""

    output_dir: str | None = "runs/attnrl_tiny"
    num_rollouts: int = 4  # small trees, so that a batch holds many problems
    rollouts_per_branch: int = 1
    learning_rate: float = 3e-4
    per_device_train_batch_size: int = 60
    gradient_accumulation_steps: int = 4
    generation_batch_size: int | None = 480
    max_steps: int = 100
    max_completion_length: int | None = 48
    min_branch_spacing: int = 0  # a step is 7 tokens long
    influence_delta: int = 2  # a solution has 6 steps
    seeded_sampling: bool = True
    use_vllm: bool = True
    vllm_max_model_length: int | None = 128
    gradient_checkpointing: bool = False
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 2
    save_strategy: str = "no"
    report_to: None | str | list[str] = "none"


DEPENDENCIES = {  # solutions of 21 steps of 10 tokens
    "output_dir": "runs/attnrl_dependencies",
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 10,
    "generation_batch_size": 240,
    "max_steps": 60,
    "max_completion_length": 352,
    "vllm_max_model_length": 512,
    "temperature": 0.7,  # at 1 the warm start is right once in five
    # Without spacing the earliest of the top fifth are mostly the first steps; `benchmarks/where_to_branch.py`.
    "min_branch_spacing": 20,
    "influence_delta": 1,  # a value is used in the next steps already
    # This model is so sure of its tokens that a look-up which turns to another one has a k3 estimate of e^20, whose
    # gradient is all of an update (docs/evidence.md).
    "beta": 0.0,
    # A cache that grows is copied at each token, which on a CPU takes most of the sampling of answers this long.
    "cache_implementation": None if HAS_CUDA else "static",
    "num_eval_problems": 100,
    "num_eval_samples": 2,
}

PANELS = {
    "attnrl/reward_initial": "accuracy of initial rollouts",
    "attnrl/reward_mc": "accuracy of continuations",
    "attnrl/valid_ratio_all": "prompts with signal",
    "attnrl/real_train_bs": "prompt batch",
    "completions/mean_length": "completion length",
    "entropy": "entropy",
    "attnrl/influence/mean": "mean influence of a step",
    "attnrl/ratio_deviation_initial": "|ratio - 1|, initial tokens",
    "attnrl/ratio_deviation_mc": "|ratio - 1|, continuation tokens",
}


def main(tiny: TinyArguments, args: Recipe, credit: object) -> None:
    watch = Stopwatch()
    task = task_of(tiny)
    folder, tokenizer, training, held_out = prepare(tiny)
    watch.lap("warm start")
    trainer = AttnRLTrainer(
        str(folder),
        exact_answer_reward,
        args,
        train_dataset=to_dataset(training),
        processing_class=tokenizer,
        step_truth=task.step_truth,
        credit=build_credit(credit, args),
    )
    watch.lap("start-up")
    curve = HeldOutCurve(trainer, tiny, held_out, Path(args.output_dir) / "curve.jsonl")
    before = curve.measure()
    trainer.accelerator.print(f"Held-out accuracy before: {before.accuracy:.3f}")
    watch.lap("evaluation")
    show_in_bar(trainer, {"attnrl/reward_initial": "accuracy", "attnrl/valid_ratio_all": "with signal"})
    trainer.train()
    watch.lap("training")
    after = curve.measure()
    header = ["", "before", "after"]
    rows = [
        ["held-out accuracy", *(f"{r.accuracy:.3f} ± {r.standard_error:.3f}" for r in (before, after))],
        ["completion tokens", *(f"{r.mean_length:.1f}" for r in (before, after))],
    ]
    if trainer.accelerator.is_main_process:
        report(trainer, header, rows, before, after, watch.seconds)
    publish(trainer, CardNotes(task.title, markdown_table(header, rows), public_command()))


def report(trainer: AttnRLTrainer, header: list, rows: list, before, after, seconds: dict[str, float]) -> None:
    """The table, the files and the pictures of the run."""
    method = method_name(trainer.args)
    title = (
        f"{method}: {before.num_problems} problems x {before.num_samples} samples, "
        f"training {seconds['training']:.0f} s"
    )
    show_table(title, header, rows)
    details = {
        "before": asdict(before),
        "after": asdict(after),
        "seconds": seconds,
        "counters": trainer.pipeline.totals,
        "updates": trainer.state.global_step,
        "log_history": trainer.state.log_history,
    }
    folder = Path(trainer.args.output_dir)
    write_results(folder, title, header, rows, details)
    plot_curves(
        {method: trainer.state.log_history},
        PANELS,
        folder / "curves.png",
        f"{method}, held-out problems: {before.accuracy:.2f} to {after.accuracy:.2f}",
    )
    print(f"Tables and pictures: {folder}")


def method_name(args: Recipe) -> str:
    """The method as set: without branch points the same pipeline is plain outcome RL."""
    if args.num_branch_points == 0:
        return f"Outcome RL ({args.num_rollouts} rollouts)"
    return f"AttnRL ({args.branching}, {args.num_branch_points} branch points)"


if __name__ == "__main__":
    with refusal_in_a_line():
        chosen = credit_arguments(chosen_credit(), Recipe)
    main(*parse_task((TinyArguments, Recipe, chosen), DEPENDENCIES))
