"""A head discovery in words: the ranking beside scores that know nothing of attention, and what checks it."""

from ...tables import markdown_table
from ..heads import KeyFocusHeads
from .comparison import HeadComparison
from .held_out import HeldOutReport
from .pairs import BASELINES, CRITERIA
from .report import HeadReport


def discovery_text(heads: KeyFocusHeads, report: HeadReport, held_out: HeldOutReport | None, rows: int = 10) -> str:
    """What was found, in Markdown.

    Args:
        heads: the heads that were chosen.
        report: the ranking.
        held_out: SRA on problems that had no part in it.
        rows: heads of the ranking to show.
    """
    header = ["score", *(f"SRA {name}{', 95 %' if name == report.criterion else ''}" for name in CRITERIA), ""]
    table = []
    for layer, head in report.ranking[:rows]:
        index = layer * report.num_heads + head
        chosen = "chosen" if (layer, head) in heads.heads else ""
        table.append([f"[{layer}, {head}]", *(_of_head(report, name, index) for name in CRITERIA), chosen])
    for baseline in BASELINES:
        table.append([baseline, *(_of_baseline(report, name, baseline) for name in CRITERIA), "no attention"])
    counts = [f"{name}: {_pairs(report.criteria[name].num_pairs)}" for name in CRITERIA]
    used = report.ranked_by
    parts = [
        f"{used.num_responses} responses to {used.num_problems} problems, {report.average} average, labels: "
        f"{heads.label_source}",
        f"Pairs of steps, {', '.join(counts)} (matched: essential step first + redundant step first)",
        markdown_table(header, table),
    ]
    if report.note:
        parts.append(f"Note: {report.note}")
    if held_out:
        parts.append(_held_out(held_out))
    if report.intervention:
        drops = ", ".join(f"{name} {mean:+.4f}" for name, (mean, _, _) in report.intervention.drops.items())
        mean, low, high = report.intervention.contrast
        parts.append(
            f"Intervention, {report.intervention.num_responses} responses: the answer loses, in nats per token, when "
            f"steps are hidden from heads: {drops}. High less low, chosen less random heads: {mean:+.4f} "
            f"({low:+.4f} to {high:+.4f})"
        )
    return "\n\n".join(parts)


def comparison_text(comparison: HeadComparison) -> str:
    """How the ranking moved between two models."""
    return (
        f"SRA over {len(comparison.first_sra)} heads (criterion {comparison.criterion}) of {comparison.first_model} "
        f"and {comparison.second_model}: Pearson {comparison.pearson:.3f}, Spearman {comparison.spearman:.3f}\n"
        f"Chosen heads {comparison.first_heads} and {comparison.second_heads}: {comparison.num_shared} shared, "
        f"overlap {comparison.overlap:.2f}"
    )


def _held_out(report: HeldOutReport) -> str:
    baselines = ", ".join(f"{name} {values[0]:.3f}" for name, values in report.baselines.items())
    return (
        f"Held out, {report.num_responses} responses, {_pairs(report.num_pairs)} pairs ({report.criterion}): chosen "
        f"heads {report.chosen:.3f} ({report.lower:.3f}-{report.upper:.3f}), best single {report.best_single:.3f}, "
        f"median head {report.median:.3f}; {baselines}"
    )


def _pairs(groups: list[int]) -> str:
    return " + ".join(map(str, groups))


def _of_head(report: HeadReport, criterion: str, index: int) -> str:
    used = report.criteria[criterion]
    return _cell(
        report, criterion, [values[index] for values in (used.sra, used.lower, used.upper)] if used.sra else []
    )


def _of_baseline(report: HeadReport, criterion: str, baseline: str) -> str:
    return _cell(report, criterion, report.criteria[criterion].baselines.get(baseline, []))


def _cell(report: HeadReport, criterion: str, values: list[float]) -> str:
    if not values:
        return "-"
    mean, low, high = values
    return f"{mean:.3f} ({low:.3f}-{high:.3f})" if criterion == report.criterion else f"{mean:.3f}"
