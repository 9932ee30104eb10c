"""Pictures of a head discovery: all heads, the accuracy of ensembles, the intervention, two models side by side."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from ...plots import BLUE, COLOURS, INK, VALUES  # noqa: E402
from ..heads import Head  # noqa: E402
from .comparison import HeadComparison  # noqa: E402
from .intervention import InterventionReport  # noqa: E402
from .report import HeadReport  # noqa: E402


CRITERION_NAMES = {
    "matched": "position-matched pairs",
    "before": "pairs before the derivation",
    "all": "all pairs",
}


def _short(model_name: str) -> str:
    return model_name.rstrip("/").split("/")[-1]


def plot_head_map(report: HeadReport, heads: Sequence[Head], path: str | Path) -> None:
    """Layer x head map of the step ranking accuracy, the chosen heads framed, and beside it what position alone gives.

    The right panel has every head at its SRA over all pairs and over the pairs it is ranked by (where these are all
    pairs, over the matched ones or those before the derivation). Scores that know nothing of attention are marked,
    also at the colour bar: a head beside one of them owes its SRA to position or length.

    Args:
        report: the ranking.
        heads: chosen heads (layer, head).
        path: PNG to write.
    """
    width, height = max(2.2 + 0.34 * report.num_heads, 4.5), max(1.4 + 0.26 * report.num_layers, 4.0)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(width + 5.0, height), gridspec_kw={"width_ratios": [width, 4.6]}
    )
    _draw_map(figure, left, report, heads)
    _draw_baselines(right, report, heads)
    used = report.ranked_by
    pairs = " + ".join(map(str, used.num_pairs))
    figure.suptitle(
        f"{_short(report.model_name)}: {used.num_responses} responses to {used.num_problems} problems, "
        f"{pairs} pairs ({report.criterion})",
        fontsize=10,
        color=INK,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_map(figure, axis, report: HeadReport, heads: Sequence[Head]) -> None:
    sra = report.ranked_by.sra
    rows = [sra[i * report.num_heads : (i + 1) * report.num_heads] for i in range(report.num_layers)]
    image = axis.imshow(rows, cmap=VALUES, vmin=0.0, vmax=1.0, aspect="auto")
    for layer, head in heads:
        axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, report.num_heads, max(1, report.num_heads // 14)))
    axis.set_yticks(range(0, report.num_layers, max(1, report.num_layers // 14)))
    axis.set_title(f"SRA on {CRITERION_NAMES[report.criterion]}", fontsize=9)
    bar = figure.colorbar(image, ax=axis, label="SRA (0.5: chance)")
    for name, (value, _, _) in report.ranked_by.baselines.items():
        bar.ax.axhline(value, color="black", linewidth=1, linestyle=":" if "length" in name else "-")


def _shown_criterion(report: HeadReport) -> str:
    """The criterion of the ranking or, where that is all pairs, the first other one that has pairs."""
    if report.criterion != "all":
        return report.criterion
    return next(name for name in CRITERION_NAMES if report.criteria[name].sra)


def _draw_baselines(axis, report: HeadReport, heads: Sequence[Head]) -> None:
    shown = _shown_criterion(report)
    across, up = report.criteria["all"], report.criteria[shown]
    axis.set_xlabel("SRA on all pairs")
    axis.set_ylabel(f"SRA on {CRITERION_NAMES[shown]}")
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.axvline(0.5, color="grey", linewidth=0.8)
    chosen = [layer * report.num_heads + head for layer, head in heads]
    axis.scatter(across.sra, up.sra, s=9, color=BLUE, alpha=0.45, label="heads")
    axis.scatter(
        [across.sra[i] for i in chosen],
        [up.sra[i] for i in chosen],
        s=42,
        facecolors="none",
        edgecolors="black",
        label="chosen",
    )
    for name, colour in zip(across.baselines, COLOURS, strict=True):
        x, (y, low, high) = across.baselines[name][0], up.baselines[name]
        axis.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="D", color=colour, markersize=6, label=f"score {name}")
    only = "no other pairs: what is ranked may be position"
    axis.set_title(only if shown == "all" else "heads beside scores without attention", fontsize=9)
    axis.legend(fontsize=7, loc="best")


def plot_ensembles(report: HeadReport, path: str | Path) -> None:
    """SRA of the mean score of 1, 2, ... heads, by greedy search and by rank, with the best single head's interval."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for values, label in ((report.greedy_sra, "greedy"), (report.top_k_sra, "top-k")):
        axis.plot(range(1, len(values) + 1), values, marker="o", label=label)
    layer, head = report.ranking[0]
    best = layer * report.num_heads + head
    used = report.ranked_by
    axis.axhspan(used.lower[best], used.upper[best], alpha=0.15, color="grey", label="best head, 95 % interval")
    for name in ("-index", "-length"):
        value = used.baselines[name][0]
        axis.axhline(max(value, 1.0 - value), linestyle=":", color=INK, linewidth=1)
        axis.annotate(f"±{name[1:]}", (1, max(value, 1.0 - value)), fontsize=7, color=INK, va="bottom")
    axis.set_xlabel("heads")
    axis.set_ylabel(f"SRA, {CRITERION_NAMES[report.criterion]}", fontsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_intervention(report: InterventionReport, path: str | Path) -> None:
    """What the answer loses when steps are hidden from the chosen heads and from random ones, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    for place, (name, (mean, low, high)) in enumerate(report.drops.items()):
        axis.bar(place, mean, color=COLOURS[place // 2], alpha=0.9 if "high" in name else 0.4)
        axis.errorbar(place, mean, yerr=[[mean - low], [high - mean]], color=INK, capsize=3)
    axis.axhline(0.0, color=INK, linewidth=0.8)
    axis.set_xticks(range(len(report.drops)), [name.replace(", ", "\n") for name in report.drops], fontsize=8)
    axis.set_ylabel("loss of the answer, nats per token", fontsize=8)
    axis.set_title(f"steps hidden from heads: {report.num_responses} responses", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_comparison(comparison: HeadComparison, path: str | Path) -> None:
    """SRA of every head in one model against the other, the chosen heads of each marked."""
    figure, axis = plt.subplots(figsize=(5.0, 4.8))
    first, second = comparison.first_sra, comparison.second_sra
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axis.scatter(first, second, s=10, color=BLUE, alpha=0.5)
    for chosen, marker, label in (
        (comparison.first_heads, "s", "chosen in the first"),
        (comparison.second_heads, "o", "chosen in the second"),
    ):
        places = [layer * comparison.num_heads + head for layer, head in chosen]
        axis.scatter(
            [first[i] for i in places],
            [second[i] for i in places],
            marker=marker,
            s=60,
            facecolors="none",
            edgecolors="black",
            label=label,
        )
    axis.set_xlabel(f"SRA in {_short(comparison.first_model)}", fontsize=8)
    axis.set_ylabel(f"SRA in {_short(comparison.second_model)}", fontsize=8)
    axis.set_title(
        f"{CRITERION_NAMES[comparison.criterion]}: Pearson {comparison.pearson:.2f}, "
        f"Spearman {comparison.spearman:.2f}",
        fontsize=9,
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
