"""Pictures of a head discovery: the map of all heads, and the accuracy of ensembles."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from ..heads import Head  # noqa: E402
from .ranking import HeadReport  # noqa: E402


def plot_head_map(report: HeadReport, heads: list[Head], path: str | Path) -> None:
    """Layer x head map of the step ranking accuracy, the chosen heads framed.

    Args:
        report: The ranking.
        heads: Chosen heads (layer, head).
        path: PNG to write.
    """
    rows = [report.sra[i * report.num_heads : (i + 1) * report.num_heads] for i in range(report.num_layers)]
    size = (2.2 + 0.34 * report.num_heads, 1.4 + 0.26 * report.num_layers)
    figure, axis = plt.subplots(figsize=(max(size[0], 4.5), max(size[1], 3.0)))
    image = axis.imshow(rows, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
    for layer, head in heads:
        axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, report.num_heads, max(1, report.num_heads // 14)))
    axis.set_yticks(range(0, report.num_layers, max(1, report.num_layers // 14)))
    axis.set_title(f"step ranking accuracy, {report.num_responses} responses", fontsize=10)
    figure.colorbar(image, ax=axis, label="SRA (0.5: chance)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_ensembles(report: HeadReport, path: str | Path) -> None:
    """SRA of the mean score of 1, 2, ... heads, by greedy search and by rank, with the best single head's interval."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for values, label in ((report.greedy_sra, "greedy"), (report.top_k_sra, "top-k")):
        axis.plot(range(1, len(values) + 1), values, marker="o", label=label)
    layer, head = report.ranking[0]
    best = layer * report.num_heads + head
    axis.axhspan(report.lower[best], report.upper[best], alpha=0.15, color="grey", label="best head, 95 % interval")
    axis.set_xlabel("heads")
    axis.set_ylabel("SRA")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
