"""Where each criterion branches solutions whose truth is known: a table over problems, a picture of one.

    python benchmarks/where_to_branch.py                  # reads with the warm start of dependency arithmetic
    python benchmarks/where_to_branch.py --model wired    # with its look-up heads alone, before any training: seconds

The solutions are the teacher's, the same for every model. Writes `where_to_branch.md` and `.png`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from attn_trainers.attnrl.exploration import CRITERIA, choose_branch_points
from attn_trainers.attnrl.steps import StepDelimiters
from attn_trainers.plots import BLUE, INK, VALUES
from attn_trainers.probes.measure import RolloutSignals, read_rollout
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.dependencies import build_dependency_tokenizer, write_dependencies
from attn_trainers.tiny.dependency_start import build_dependency_model
from attn_trainers.tiny.runs import TinyArguments, prepare, task_of
from attn_trainers.tiny.truth import StepTruth, read_truth


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


PROBE_SEED = 3  # problems of their own, neither trained on nor held out
WIRED = "wired"


@dataclass
class Arguments(TinyArguments):
    """What is read, and how it is branched; the defaults are those of the recipe."""

    task: str = "dependencies"
    model: str = field(default="", metadata={"help": "A model of this task, or 'wired'; default: the warm start."})
    num_problems: int = field(default=60, metadata={"help": "Problems, one solution each."})
    num_branch_points: int = field(default=2, metadata={"help": "Branch points per solution (N)."})
    branch_top_fraction: float = field(default=0.2, metadata={"help": "Share of the steps that are candidates (ρ)."})
    min_branch_spacing: int = field(default=20, metadata={"help": "Tokens between branch points of attention."})
    influence_delta: int = field(default=1, metadata={"help": "Δ of the influence."})
    output_dir: str = field(default="runs/where_to_branch", metadata={"help": "Where table and picture go."})


@dataclass(frozen=True)
class Rule:
    """How branch points are chosen.

    Attributes:
        name: in the table.
        criterion: what steps are ranked by.
        spacing: tokens between branch points of attention.
        delta: Δ of the influence.
    """

    name: str
    criterion: str
    spacing: int
    delta: int


@dataclass(frozen=True)
class Solution:
    """A teacher's solution.

    Attributes:
        problem: text of the problem.
        signals: what the model says of it, by Δ.
        truth: of each step.
    """

    problem: str
    signals: dict[int, RolloutSignals]
    truth: list[StepTruth]

    @property
    def step_ranges(self) -> list[tuple[int, int]]:
        """First token of each step and the one behind it, the same for every Δ."""
        return next(iter(self.signals.values())).step_ranges


def rules(args: Arguments) -> dict[str, Rule]:
    """Every criterion as the arguments set it, and before them attention as published; by name."""
    published = Rule("attention, Δ = 4, no spacing", "attention", 0, 4)
    asked = [Rule(name, name, args.min_branch_spacing, args.influence_delta) for name in CRITERIA]
    return {rule.name: rule for rule in (published, *asked)}


def load(args: Arguments) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """The model that reads, and its tokenizer."""
    if args.model == WIRED:
        tokenizer = build_dependency_tokenizer()
        torch.manual_seed(0)
        return build_dependency_model(tokenizer).eval(), tokenizer
    folder = args.model or prepare(args)[0]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def read_solutions(args: Arguments) -> list[Solution]:
    """Solutions of the teacher, read by the model."""
    model, tokenizer = load(args)
    task, rng, found = task_of(args), random.Random(PROBE_SEED), []
    delimiters = StepDelimiters.from_tokenizer(tokenizer)
    deltas = {rule.delta for rule in rules(args).values()}
    for problem in tqdm(task.problems(args.num_problems, PROBE_SEED), desc="Read", unit="solution"):
        prompt = tokenizer(problem.text + "<think>")["input_ids"]
        ids = tokenizer(write_dependencies(problem, rng, task.settings.teacher))["input_ids"]
        signals = {delta: read_rollout(model, prompt, ids, delimiters, delta=delta) for delta in deltas}
        texts = [tokenizer.decode(ids[start:end]) for start, end in signals[args.influence_delta].step_ranges]
        found.append(Solution(problem.text, signals, read_truth(problem, texts)))
    return found


def branched_steps(args: Arguments, rule: Rule, solution: Solution, seed: int) -> list[int]:
    """Steps that a rule branches at, or in."""
    signals = solution.signals[rule.delta]
    points = choose_branch_points(
        rule.criterion,
        step_ranges=signals.step_ranges,
        num_points=args.num_branch_points,
        top_fraction=args.branch_top_fraction,
        min_spacing=rule.spacing,
        influence=signals.influence,
        entropies=signals.entropies,
        truth=[float(truth.matters) for truth in solution.truth],
        rng=random.Random(seed),
    )
    return [
        next(step for step, (_, end) in enumerate(signals.step_ranges) if offset < end) for offset in points.offsets
    ]


def table(args: Arguments, solutions: Sequence[Solution]) -> str:
    """What each rule's branch points are like, means over all of them."""

    def steps(rule: Rule) -> list[list[int]]:
        return [branched_steps(args, rule, solution, seed) for seed, solution in enumerate(solutions)]

    rows, first = [], steps(rules(args)["first_steps"])
    for name, rule in rules(args).items():
        chosen = steps(rule)
        pairs = [(solution, step) for solution, found in zip(solutions, chosen, strict=True) for step in found]
        shared = sum(len(set(found) & set(others)) for found, others in zip(chosen, first, strict=True))
        truths = [solution.truth[step] for solution, step in pairs]
        rows.append(
            [
                name,
                f"{sum(step for _, step in pairs) / len(pairs):.1f}",
                f"{shared / len(pairs):.0%}",
                f"{sum(truth.needed for truth in truths) / len(pairs):.0%}",
                f"{sum(truth.matters for truth in truths) / len(pairs):.0%}",
                f"{sum(truth.num_descendants for truth in truths) / len(pairs):.1f}",
            ]
        )
    return markdown_table(["criterion", "step (from 0)", "as first_steps", "needed", "matter", "descendants"], rows)


def draw(args: Arguments, solution: Solution, path: Path) -> None:
    """One solution: its steps by influence and truth, and below them where each criterion branches."""
    figure, axis = plt.subplots(figsize=(11, 3.6))
    ranges, values = solution.step_ranges, solution.signals[args.influence_delta].influence
    peak, most = max(values), max(truth.num_descendants for truth in solution.truth)
    for (start, end), influence, truth in zip(ranges, values, solution.truth, strict=True):
        axis.bar(start, influence / peak, width=end - start - 0.6, align="edge", color=BLUE, alpha=0.6)
        colour = VALUES(truth.num_descendants / most) if truth.needed else "#d0d0d0"
        axis.barh(-0.25, end - start - 0.6, left=start, height=0.3, color=colour, edgecolor=INK, linewidth=0.4)
        label = str(truth.num_descendants) if truth.needed else "–"
        axis.text((start + end) / 2, -0.25, label, ha="center", va="center", fontsize=7, color=INK)
    for lane, name in enumerate(CRITERIA, start=1):
        y = -0.25 - 0.38 * lane
        axis.axhline(y, color=INK, linewidth=0.4, alpha=0.4)
        axis.text(-3, y, name, ha="right", va="center", fontsize=8, color=INK)
        for step in branched_steps(args, rules(args)[name], solution, seed=0):
            axis.plot(ranges[step][0], y, marker="v", color=INK, markersize=7)
    axis.text(-3, -0.25, "descendants", ha="right", va="center", fontsize=8, color=INK)
    axis.text(-3, 0.5, "influence", ha="right", va="center", fontsize=8, color=INK)
    axis.set_yticks([])
    axis.set_xlim(-0.5, ranges[-1][1])
    axis.set_xlabel("token of the solution; grey: steps that the answer does not need; ▾ branch point", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(solution.problem, fontsize=8, color=INK, loc="left")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(args: Arguments) -> None:
    solutions = read_solutions(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = table(args, solutions)
    (folder / "where_to_branch.md").write_text(text + "\n")
    draw(args, solutions[0], folder / "where_to_branch.png")
    reader = {WIRED: "the wired look-up heads", "": "the warm start"}.get(args.model, args.model)
    print(f"Branch points of {len(solutions)} solutions of dependency arithmetic, read by {reader}:\n\n{text}\n")
    print(f"Picture: {folder / 'where_to_branch.png'}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
