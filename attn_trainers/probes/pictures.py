"""Pictures of a branching probe."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from ..plots import BLUE, COLOURS, INK, VALUES, plt
from .disruption import KINDS, NUM_POSITION_BINS, Disruption, accuracy, in_kind, position_bin
from .statistics import Interval, Tree


_SHADES = {"right": VALUES(0.9), "mixed": BLUE, "wrong": VALUES(0.1)}
_POSITIONS = np.linspace(0, 1, 11)


def _bars_between(interval: Interval) -> list[list[float]]:
    """Lengths of an error bar below and above, 0 where they have no end."""
    ends = interval.value - interval.low, interval.high - interval.value
    return [[max(0.0, end) if np.isfinite(end) else 0.0] for end in ends]


def _shares(axis, summaries: Mapping[str, Mapping[str, Interval]], unit: str) -> None:
    """A stacked bar per criterion, with the interval of the mixed share."""
    for row, summary in enumerate(summaries.values()):
        left = 0.0
        for kind in ("mixed", "right", "wrong"):
            share = summary[f"{unit}_{kind}"]
            axis.barh(row, share.value, left=left, color=_SHADES[kind], label=kind if row == 0 else None)
            left += share.value
        mixed = summary[f"{unit}_mixed"]
        axis.errorbar(mixed.value, row, xerr=_bars_between(mixed), color=INK, capsize=4)
    axis.set_yticks(range(len(summaries)), summaries)
    axis.invert_yaxis()
    axis.set_title(f"share of {unit}", fontsize=10)


def plot_branching(
    summaries: Mapping[str, Mapping[str, Interval]], trees: Mapping[str, Sequence[Tree]], path: Path, title: str
) -> None:
    """Shares of trees and of prompts, what a mixed tree costs, and where the points lie."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 3.4 + 0.7 * len(summaries)), layout="constrained")
    _shares(axes[0, 0], summaries, "trees")
    _shares(axes[0, 1], summaries, "prompts")
    # A legend above the bars would hide the longest of them.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    for row, summary in enumerate(summaries.values()):
        cost = summary["tokens_per_mixed_tree"]
        if np.isfinite(cost.value):
            axes[1, 0].barh(row, cost.value, color=BLUE)
            axes[1, 0].errorbar(cost.value, row, xerr=_bars_between(cost), color=INK, capsize=4)
    axes[1, 0].set_yticks(range(len(summaries)), summaries)
    axes[1, 0].invert_yaxis()
    axes[1, 0].set_title("sampled tokens per mixed tree", fontsize=10)
    for (name, grown), colour in zip(trees.items(), cycle(COLOURS), strict=False):
        positions = [offset / tree.num_tokens for tree in grown for offset in tree.offsets]
        if positions:
            counts, _ = np.histogram(positions, _POSITIONS)
            axes[1, 1].stairs(counts / len(positions), _POSITIONS, label=name, color=colour, linewidth=1.8)
    axes[1, 1].set_title("share of branch points by position in the rollout", fontsize=10)
    axes[1, 1].legend(fontsize=8)
    _finish(figure, axes.flat, path, title)


def plot_disruption(disruptions: Sequence[Disruption], seed: int, path: Path, title: str) -> None:
    """Accuracy after corrupted steps by kind, and by kind and position."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    centres = (np.arange(NUM_POSITION_BINS) + 0.5) / NUM_POSITION_BINS
    for place, (kind, colour) in enumerate(zip(KINDS, cycle(COLOURS), strict=False)):
        chosen = [d for d in disruptions if in_kind(d, kind)]
        if not chosen:
            continue
        whole = accuracy(chosen, seed)
        axes[0].bar(place, whole.value, color=colour)
        axes[0].errorbar(place, whole.value, yerr=_bars_between(whole), color=INK, capsize=4)
        binned = [accuracy([d for d in chosen if position_bin(d) == i], seed) for i in range(NUM_POSITION_BINS)]
        bars = np.hstack([_bars_between(one) for one in binned])
        shift = 0.02 * (place - 1)  # so that error bars do not cover each other
        axes[1].errorbar(
            centres + shift, [one.value for one in binned], yerr=bars, color=colour, marker="o", capsize=3, label=kind
        )
    axes[0].set_xticks(
        range(len(KINDS)), [f"{kind}\n(n = {sum(in_kind(d, kind) for d in disruptions)})" for kind in KINDS]
    )
    axes[0].set_title("right answers after a corrupted step", fontsize=10)
    axes[1].set_title("by position of the step", fontsize=10)
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.set_ylim(0, 1)
    _finish(figure, axes, path, title)


def _finish(figure, axes, path: Path, title: str) -> None:
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)
