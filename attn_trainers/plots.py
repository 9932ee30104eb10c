"""Pictures of training curves, and the colours that all pictures share."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import colormaps  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402


INK = "#2b2b2b"
BLUE = "#2f6db3"
COLOURS = (BLUE, "#d9822b", "#3c9d5b", "#8a4fae")  # of runs in one panel
VALUES = colormaps["RdYlGn"]


def curve(log_history: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which a metric was logged."""
    points = [(entry["step"], entry[name]) for entry in log_history if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(histories: dict[str, Sequence[dict]], panels: dict[str, str], path: str | Path, title: str) -> None:
    """One panel per metric over the optimizer steps.

    Args:
        histories: name of a run to its `trainer.state.log_history`; several runs share the panels.
        panels: metric name to panel title; metrics that were never logged are left out.
        path: PNG to write.
        title: of the picture.
    """
    panels = {
        name: label for name, label in panels.items() if any(curve(history, name)[0] for history in histories.values())
    }
    columns = min(3, max(1, len(panels)))
    rows = -(-len(panels) // columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=False):
        for (run, history), colour in zip(histories.items(), cycle(COLOURS), strict=False):
            steps, values = curve(history, name)
            axis.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) < 3 else None, label=run)
        axis.set_title(label, fontsize=10, color=INK)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(histories) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.suptitle(title, color=INK)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
