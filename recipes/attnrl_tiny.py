"""AttnRL on a CPU in minutes: a small Qwen2 learns multi-step arithmetic through the real stack.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/attnrl_tiny.py

A noisy teacher warm-starts the model (cached in `--cache_dir`); AttnRL then trains it under vLLM colocate and
evaluates it on held-out problems before and after. Any field can be set on the command line, e.g. `--branching random`
or `--num_branch_points 0` (plain outcome RL) for a comparison on equal ground, `--credit rhythm` for that credit on
the trees, or `--use_vllm false`.

The output folder holds the model, its card, `results.md`, `results.json`, `curves.png` and `trees.png`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from trl import TrlParser

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attnrl.pictures import plot_trees
from attn_trainers.attnrl.rollouts import PromptRollouts, branches_of
from attn_trainers.base.card import CardNotes, public_command, publish
from attn_trainers.launch.credits import build_credit, chosen_credit, credit_arguments
from attn_trainers.launch.recipe import HAS_CUDA
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
    to_dataset,
    write_results,
)


@dataclass
class Recipe(AttnRLConfig):
    """Settings of this run; those not named here are the defaults of `AttnRLConfig`."""

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
    folder, tokenizer, training, held_out = prepare(tiny)
    watch.lap("warm start")
    trainer = AttnRLTrainer(
        str(folder),
        exact_answer_reward,
        args,
        train_dataset=to_dataset(training),
        processing_class=tokenizer,
        credit=build_credit(credit, args),
    )
    trainer.keeps_prompts = True  # for the picture of a tree
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
    publish(
        trainer, CardNotes("multi-step arithmetic made on the spot", markdown_table(header, rows), public_command())
    )


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
    plot_curves({method: trainer.state.log_history}, PANELS, folder / "curves.png", f"{method}, multi-step arithmetic")
    branched = [p for p in trainer.last_prompts if p.continuations]
    if branched:
        prompt = max(branched, key=num_mixed_trees)
        problem = trainer.processing_class.decode(prompt.prompt_ids).removesuffix("<think>")
        plot_trees(prompt, problem, folder / "trees.png")
    print(f"Tables and pictures: {folder}")


def method_name(args: Recipe) -> str:
    """The method as set: without branch points the same pipeline is plain outcome RL."""
    if args.num_branch_points == 0:
        return f"Outcome RL ({args.num_rollouts} rollouts)"
    return f"AttnRL ({args.branching}, {args.num_branch_points} branch points)"


def num_mixed_trees(prompt: PromptRollouts) -> int:
    """How many of a prompt's trees have right and wrong leaves: those in which branching tells steps apart."""
    return sum(len({rollout.reward, *(b.reward for b in branches_of(rollout))}) > 1 for rollout in prompt.rollouts)


if __name__ == "__main__":
    main(*TrlParser((TinyArguments, Recipe, credit_arguments(chosen_credit(), Recipe))).parse_args_and_config())
