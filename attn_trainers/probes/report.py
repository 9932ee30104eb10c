"""The tables of a branching probe, what they mean in words, and its files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..attnrl.branching_report import BranchingReport
from ..tables import markdown_table
from .arguments import BranchingArguments
from .disruption import KINDS, NUM_POSITION_BINS, Disruption, accuracy, in_kind, matched_difference, position_bin
from .pictures import plot_branching, plot_disruption
from .statistics import Interval, Tree, prompts_needed, ratio, ratio_difference, summarise, sums_of


# Measure, its column, factor and decimals.
COLUMNS = {
    "position": ("position", 1, 2),
    "fallbacks": ("fallbacks %", 100, 0),
    "agreement": ("as first_steps %", 100, 0),
    "trees_right": ("trees right %", 100, 1),
    "trees_mixed": ("mixed %", 100, 1),
    "trees_wrong": ("wrong %", 100, 1),
    "prompts_right": ("prompts right %", 100, 1),
    "prompts_mixed": ("mixed %", 100, 1),
    "prompts_wrong": ("wrong %", 100, 1),
    "solved_broken": ("solved, then wrong %", 100, 0),
    "variance": ("variance", 1, 3),
    "tokens_per_mixed_tree": ("tokens / mixed tree", 1, 0),
}
_TABLES = (
    ("position", "fallbacks", "agreement", "variance", "tokens_per_mixed_tree"),
    ("trees_right", "trees_mixed", "trees_wrong", "prompts_right", "prompts_mixed", "prompts_wrong", "solved_broken"),
)
_WORTH_SEEING = 0.05  # a difference in the share of mixed trees that a user would act on


def cell(interval: Interval, factor: float, digits: int) -> str:
    """A value with its interval, "–" where it is not defined."""
    values = [factor * one for one in (interval.value, interval.low, interval.high)]
    texts = ["–" if math.isnan(v) else "∞" if math.isinf(v) else f"{v:.{digits}f}" for v in values]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if texts[0] != "–" else "–"


def branching_tables(summaries: Mapping[str, Mapping[str, Interval]]) -> str:
    """One table of the points and their price, one of the shares; a row per criterion."""
    tables = []
    for names in _TABLES:
        header = ["criterion", *(COLUMNS[name][0] for name in names)]
        rows = [[key, *(cell(one[n], *COLUMNS[n][1:]) for n in names)] for key, one in summaries.items()]
        tables.append(markdown_table(header, rows))
    return "\n\n".join(tables)


def disruption_tables(disruptions: Sequence[Disruption], seed: int) -> str:
    """Accuracy after a corrupted step by kind and by position; then kinds against the rest at the same position."""

    def row(label: str, chosen: Sequence[Disruption]) -> list[str]:
        return [label, str(len(chosen)), cell(accuracy(chosen, seed), 100, 1)]

    kinds = {"influence": "top by influence", "entropy": "top by entropy", "rest": "the rest"}
    rows = [row(kinds[kind], [d for d in disruptions if in_kind(d, kind)]) for kind in KINDS]
    for index in range(NUM_POSITION_BINS):
        label = f"position {index / NUM_POSITION_BINS:.1f} to {(index + 1) / NUM_POSITION_BINS:.1f}"
        rows.append(row(label, [d for d in disruptions if position_bin(d) == index]))
    matched = []
    for kind in ("influence", "entropy"):
        interval = matched_difference(disruptions, kind, seed)
        matched.append([kinds[kind], cell(interval, 100, 1)])
    return (
        markdown_table(["corrupted step", "steps", "right afterwards %"], rows)
        + "\n\n"
        + markdown_table(["kind", "minus the rest at the same position, points"], matched)
    )


# What the tables mean -----------------------------------------------------------------------------------


def conclusions(
    trees: Mapping[str, Sequence[Tree]], choice: BranchingReport, disruptions: Sequence[Disruption] | None, seed: int
) -> list[str]:
    """Sentences for the user, one per finding."""
    lines = [choice.advice or f"Attention chooses: {1 - choice.first_steps_agreement:.0%} of its points are its own."]
    if "attention" in trees:
        lines += [compared(trees, other, seed) for other in trees if other != "attention"]
    lines += _sizes(trees)
    if disruptions is not None:
        lines.append(disrupted(disruptions, seed))
    return lines


def compared(trees: Mapping[str, Sequence[Tree]], other: str, seed: int) -> str:
    """Attention against another criterion by the share of mixed trees."""
    names = ("attention", other)
    sums = [sums_of(trees[name], "trees_mixed") for name in names]
    shares = [ratio(one, seed).value for one in sums]
    difference = ratio_difference(*sums, seed)
    prompts = len(sums[0][0])
    if not any(map(sum, (sums[0][0], sums[1][0]))):
        return f"Mixed trees: none by attention or {other} with {prompts} prompts; nothing can be compared."
    costs = [_rounded(ratio(sums_of(trees[name], "tokens_per_mixed_tree"), seed).value) for name in names]
    found = (
        f"Mixed trees: {shares[0]:.1%} by attention against {shares[1]:.1%} by {other}, difference "
        f"{cell(difference, 100, 1)} points, each for {costs[0]} against {costs[1]} tokens"
    )
    if not difference.holds_zero:
        return f"{found}: {'attention' if difference.value > 0 else other} gives more with {prompts} prompts."
    if difference.low == difference.high:
        return f"{found}: the same in each of {prompts} prompts."
    needed = prompts_needed(difference, prompts, _WORTH_SEEING)
    more = f"; {100 * _WORTH_SEEING:.0f} points would take about {needed} prompts to show" if needed > prompts else ""
    return f"{found}: the interval holds zero, no difference is shown with {prompts} prompts{more}."


def _rounded(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "endless"


def _sizes(trees: Mapping[str, Sequence[Tree]]) -> list[str]:
    """What makes every comparison weak: prompts without both kinds of answers, rollouts without a place to branch."""
    lines = []
    bare = {name: sum(not tree.offsets for tree in grown) for name, grown in trees.items()}
    for count in sorted(set(bare.values()) - {0}):
        names = ", ".join(name for name in bare if bare[name] == count)
        lines.append(f"{count} of {len(trees[names.split(', ')[0]])} rollouts have no place to branch by {names}.")
    everywhere = {kind: min(ratio(sums_of(t, f"prompts_{kind}")).value for t in trees.values()) for kind in _EASY_HARD}
    for kind, advice in _EASY_HARD.items():
        if everywhere[kind] > 0.5:
            lines.append(
                f"At least {everywhere[kind]:.0%} of the prompts are all {kind} by every criterion: {advice}."
            )
    return lines


_EASY_HARD = {
    "right": "the problems are too easy for this model to learn from",
    "wrong": "the problems are too hard for this model, or its completions too short",
}


def disrupted(disruptions: Sequence[Disruption], seed: int) -> str:
    """Whether steps of top influence matter more than others at their position."""
    prompts = len({d.prompt for d in disruptions})
    interval = matched_difference(disruptions, "influence", seed)
    if not disruptions:
        return "Disruption: no right rollout has a step with a number between its first and its last."
    if math.isnan(interval.value):
        return f"Disruption: {len(disruptions)} steps, none of top influence beside another at its position."
    found = (
        f"Disruption: after steps of top influence {cell(interval, 100, 1)} points against the rest at their position"
    )
    if interval.holds_zero:
        return (
            f"{found}: the interval holds zero, influence is not shown to tell which steps matter ({prompts} prompts)."
        )
    if interval.value < 0:
        return f"{found}: an error there does more harm, as influence says ({prompts} prompts)."
    return f"{found}: an error there does less harm, against what influence says ({prompts} prompts)."


# Files -------------------------------------------------------------------------------------------------


def write_report(
    args: BranchingArguments,
    trees: Mapping[str, Sequence[Tree]],
    choice: BranchingReport,
    disruptions: Sequence[Disruption] | None,
) -> str:
    """Write `branching.md`, `branching.json`, `branching.png` and, with disruptions, `disruption.png`.

    Args:
        args: of the probe; its folder exists.
        trees: of each criterion.
        choice: how attention branches.
        disruptions: corrupted steps, if any were made.

    Returns:
        The tables and what they mean, as Markdown.
    """
    folder, name = Path(args.output_dir), Path(args.model).name
    summaries = {criterion: summarise(grown, args.seed) for criterion, grown in trees.items()}
    some = next(iter(trees.values()))
    settings = ("step_mode", "influence_delta", "min_branch_spacing", "max_completion_length", "temperature")
    facts = (
        f"{name} on {Path(args.data).name}: {len({tree.prompt for tree in some})} prompts, {len(some)} rollouts, "
        f"{args.num_branch_points} points of {args.rollouts_per_branch} continuations each; "
        f"{', '.join(f'{field}={getattr(args, field)}' for field in settings)}. 95 % bootstrap intervals over prompts."
    )
    parts = [facts, branching_tables(summaries)]
    if disruptions is not None:
        parts.append(disruption_tables(disruptions, args.seed))
    parts.append(str(replace(choice, advice="")))
    parts.append("\n".join(f"- {line}" for line in conclusions(trees, choice, disruptions, args.seed)))
    text = "\n\n".join(parts)
    (folder / "branching.md").write_text(text + "\n", encoding="utf-8")
    record = {
        "facts": facts,
        "criteria": {key: {m: asdict(interval) for m, interval in one.items()} for key, one in summaries.items()},
        "attention": asdict(choice),
        "trees": {key: [asdict(tree) for tree in grown] for key, grown in trees.items()},
        "disruptions": None if disruptions is None else [asdict(one) for one in disruptions],
    }
    (folder / "branching.json").write_text(json.dumps(_without_nan(record), indent=1) + "\n", encoding="utf-8")
    plot_branching(summaries, trees, folder / "branching.png", f"Branching of {name} on {Path(args.data).name}")
    if disruptions:
        plot_disruption(disruptions, args.seed, folder / "disruption.png", f"Corrupted steps, {name}")
    return text


def _without_nan(value):
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
