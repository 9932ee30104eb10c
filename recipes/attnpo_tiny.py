"""AttnPO on a CPU in minutes: a small Qwen2 that re-checks its arithmetic without need, trained to think shorter.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/attnpo_tiny.py

A noisy teacher warm-starts the model on chains whose steps are followed by a random number of re-checks ("Wait, let
me check: ...") and whose answer restates the steps; the model is cached in `--cache_dir`. Its key-focus heads are
found on its own correct responses, in which the re-checks are the redundant steps. Then AttnPO and, for the same
number of steps, TLMRE (the same rewards and advantages, no step scales) train it, and both are evaluated on held-out
problems. `--compare false` leaves TLMRE out.

The output folder holds the model, its card, `results.md`, `results.json`, `curves.png`, `heads/` (heads file, head
map, ensembles) and `attnpo/` (pages of single responses).
"""

import json
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from attn_trainers import AttnPOConfig, AttnPOTrainer
from attn_trainers.attnpo.discovery.labels import ESSENTIAL, REDUNDANT
from attn_trainers.attnpo.discovery.pictures import plot_ensembles, plot_head_map
from attn_trainers.attnpo.discovery.run import DiscoveryArguments, discover_heads
from attn_trainers.attnpo.steps import split_paragraphs
from attn_trainers.base.card import CardNotes, public_command, publish
from attn_trainers.launch.recipe import HAS_CUDA
from attn_trainers.launch.tasks import parse_task
from attn_trainers.plots import plot_curves
from attn_trainers.sampling.requests import GenerationRequest, SamplingSettings
from attn_trainers.sampling.transformers import sample_with_transformers
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.arithmetic import prompt_messages
from attn_trainers.tiny.runs import (
    HeldOutCurve,
    HeldOutResult,
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
from attn_trainers.tiny.tasks import Task


@dataclass
class Arguments(TinyArguments):
    """The task and what is compared."""

    num_operations: int = field(default=3, metadata={"help": "Operations per problem."})
    max_start: int = field(default=29, metadata={"help": "Largest number that a chain starts from."})
    noise: float | None = field(default=0.05, metadata={"help": "Probability that the teacher writes a wrong result."})
    recheck: float | None = field(default=0.5, metadata={"help": "Probability that a step is followed by a re-check."})
    restate: bool = field(default=True, metadata={"help": "Whether the answer repeats the steps without re-checks."})
    warm_start_steps: int | None = field(default=1200, metadata={"help": "Optimizer steps of the warm start."})
    num_probed: int = field(default=1000, metadata={"help": "Problems on which the heads are found."})
    num_eval_samples: int = field(default=2, metadata={"help": "Samples per held-out problem."})
    compare: bool = field(default=True, metadata={"help": "Train TLMRE for as many steps too."})


@dataclass
class Recipe(AttnPOConfig):
    """Settings of this run; those not named here are the defaults of `AttnPOConfig`."""

    output_dir: str | None = "runs/attnpo_tiny"
    step_mode: str = "paragraphs"
    length_penalty: float = 0.4  # twice the published weight: a run is short
    schedule_fraction: float = 0.5
    learning_rate: float = 1.5e-4
    per_device_train_batch_size: int = 64
    gradient_accumulation_steps: int = 4
    max_steps: int = 60
    max_completion_length: int | None = 160
    use_vllm: bool = False
    vllm_max_model_length: int | None = 256
    gradient_checkpointing: bool = False
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 2
    page_steps: int = 20
    save_strategy: str = "no"
    report_to: None | str | list[str] = "none"


DEPENDENCIES = {  # solutions of 21 steps of 10 tokens
    "output_dir": "runs/attnpo_dependencies",
    "noise": None,  # those of the task
    "recheck": None,
    "warm_start_steps": None,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "max_completion_length": 352,
    "vllm_max_model_length": 512,
    "temperature": 0.7,
    "cache_implementation": None if HAS_CUDA else "static",  # see `attnrl_tiny.py`
    "num_probed": 300,
    "num_eval_problems": 100,
}

PANELS = {
    "attnpo/accuracy": "accuracy",
    "attnpo/thinking_tokens": "thinking tokens",
    "attnpo/steps_per_response": "steps per response",
    "attnpo/correct_rescaled": "correct responses rescaled",
    "attnpo/tokens_attenuated": "tokens attenuated",
    "attnpo/tokens_protected": "tokens protected",
    "attnpo/score_to_baseline": "mean S / S_base",
    "attnpo/groups_all_correct": "prompts always solved",
    "entropy": "entropy",
}


def probe_data(folder: Path, tokenizer, problems: list, task: Task, args: Recipe, path: Path) -> None:
    """The model's own correct responses, sampled as in training; steps that the answer needs are essential, others
    redundant.
    """
    texts = [
        tokenizer.apply_chat_template(prompt_messages(p), add_generation_prompt=True, tokenize=False) for p in problems
    ]
    requests = [
        GenerationRequest(tokenizer(text)["input_ids"], args.max_completion_length, seed=i)
        for i, text in enumerate(texts)
    ]
    settings = SamplingSettings(temperature=args.temperature, batch_size=200)
    lines = []
    for index, sample in sample_with_transformers(str(folder), settings, tokenizer, requests):
        problem, ids = problems[index], sample.token_ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if exact_answer_reward([text], [problem.answer]) == [1.0]:
            steps = [text[step.start : step.end] for step in split_paragraphs(text)]
            labels = [ESSENTIAL if needed else REDUNDANT for needed in task.needed(problem, steps)]
            record = {"problem": problem.text, "completion": text, "completion_ids": ids, "labels": labels}
            lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))


def find_heads(model: Path, tokenizer, problems: list, task: Task, args: Recipe, folder: Path) -> tuple[Path, str]:
    """Heads file of the model, and a line that says how good the heads are."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "responses.jsonl"
    if not data.exists():
        probe_data(model, tokenizer, problems, task, args, data)
    heads, report, held_out = discover_heads(
        DiscoveryArguments(
            str(model), str(data), str(folder), step_mode="paragraphs", prompt_template="{problem}", num_heads=3
        )
    )
    plot_head_map(report, list(heads.heads), folder / "head_map.png")
    plot_ensembles(report, folder / "ensembles.png")
    line = f"Heads {[list(pair) for pair in heads.heads]}"
    if held_out:
        line += (
            f": step ranking accuracy on {held_out.num_responses} held-out responses {held_out.chosen:.3f} (95 % "
            f"interval {held_out.lower:.3f} to {held_out.upper:.3f}), median head {held_out.median:.3f}"
        )
    return folder / "heads.json", line


def run(name: str, args: Recipe, model: Path, tokenizer, training, held_out, tiny: Arguments, watch: Stopwatch):
    """Train and evaluate before and after: the trainer and the two results."""
    set_seed(args.seed)
    trainer = AttnPOTrainer(
        str(model), exact_answer_reward, args, train_dataset=to_dataset(training), processing_class=tokenizer
    )
    torch.manual_seed(args.seed)
    curve = HeldOutCurve(trainer, tiny, held_out, Path(args.output_dir) / "curve.jsonl")
    before = curve.measure()
    watch.lap(f"{name}: start-up and evaluation")
    show_in_bar(trainer, {"attnpo/accuracy": "accuracy", "attnpo/thinking_tokens": "thinking tokens"})
    trainer.train()
    watch.lap(f"{name}: training")
    torch.manual_seed(args.seed)
    after = curve.measure()
    watch.lap(f"{name}: evaluation")
    trainer.accelerator.print(
        f"{name}: accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}, thinking tokens "
        f"{before.mean_thinking:.1f} -> {after.mean_thinking:.1f}"
    )
    return trainer, before, after


def main(tiny: Arguments, args: Recipe) -> None:
    if tiny.compare and args.use_vllm:
        raise ValueError("compare=True trains twice in one process, which one vLLM engine cannot serve; set it False.")
    watch = Stopwatch()
    task = task_of(tiny, tiny.restate)
    model, tokenizer, training, held_out = prepare(tiny, tiny.restate)
    watch.lap("warm start")
    folder = Path(args.output_dir)
    heads_line = "Heads as given." if args.heads else "No heads: no step is scaled."
    if args.heads is None and args.scales_credit:
        with PartialState().main_process_first():
            file, heads_line = find_heads(model, tokenizer, training[: tiny.num_probed], task, args, folder / "heads")
        args.heads = str(file)
        watch.lap("heads")
    shared = (model, tokenizer, training, held_out, tiny, watch)
    off = copy(args)
    off.attenuate_positive = off.protect_negative = False
    off.output_dir = str(folder / "tlmre")
    trainer, before, after = run("AttnPO", args, *shared)
    results = {"before": before, "AttnPO": after}
    histories = {"AttnPO": trainer.state.log_history}
    if tiny.compare:
        baseline, _, results["TLMRE"] = run("TLMRE", off, *shared)
        histories["TLMRE"] = baseline.state.log_history
    header, rows = result_rows(results)
    if trainer.accelerator.is_main_process:
        report(folder, args, heads_line, results, histories, watch.seconds)
    publish(trainer, CardNotes(task.title, markdown_table(header, rows), public_command()))


def result_rows(results: dict[str, HeldOutResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    start = results["before"]
    rows = [
        ["held-out accuracy", *(f"{r.accuracy:.3f} ± {r.standard_error:.3f}" for r in results.values())],
        ["thinking tokens", *(f"{r.mean_thinking:.1f}" for r in results.values())],
        ["shorter by", *(f"{1 - r.mean_thinking / start.mean_thinking:.1%}" for r in results.values())],
    ]
    return ["", *results], rows


def report(
    folder: Path,
    args: Recipe,
    heads_line: str,
    results: dict[str, HeldOutResult],
    histories: dict[str, list[dict]],
    seconds: dict[str, float],
) -> None:
    """The table, the files and the pictures of the run."""
    start = results["before"]
    header, rows = result_rows(results)
    title = f"AttnPO, {args.max_steps} steps, {start.num_problems} held-out problems x {start.num_samples} samples"
    show_table(title, header, rows)
    print(heads_line)
    details = {"heads": heads_line, "seconds": seconds, "log_history": histories}
    details |= {"results": {name: asdict(result) for name, result in results.items()}}
    write_results(folder, title, header, rows, details)
    plot_curves(histories, PANELS, folder / "curves.png", "AttnPO on a small task with steps that are not needed")
    print(f"{sum(seconds.values()):.0f} s in all. Tables and pictures: {folder}")


if __name__ == "__main__":
    main(*parse_task((Arguments, Recipe), DEPENDENCIES))
