"""Pictures of a run: training curves, and the trees of one prompt with influence, values and branch
points."""

import textwrap
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402

from ..plots import BLUE, INK, VALUES
from .rollouts import PromptRollouts, branches_of  # noqa: E402
from .trees import tree_segments  # noqa: E402


TITLE_WIDTH, TITLE_LINES = 130, 3
LEGEND = "bars: segments by value V(s), with advantage A(s); above: influence of each step; ▾ branch point"


def plot_trees(prompt: PromptRollouts, problem: str, path: str | Path) -> None:
    """The trees of one prompt.

    Each rollout is a bar of tokens cut at its branch points, coloured by the value of each segment; its continuations
    hang below it; the influence of its steps stands above it.

    Args:
        prompt: rollouts with rewards and, where expanded, branches.
        problem: text for the title.
        path: PNG to write.
    """
    segments_of = tree_segments(prompt.trees())
    lanes = [1 + len(branches_of(rollout)) for rollout in prompt.rollouts]
    figure, axis = plt.subplots(figsize=(11, 0.9 + 0.42 * sum(lanes) + 0.75 * len(lanes)))
    peak = max(
        (float(r.influence.max()) for r in prompt.rollouts if r.influence is not None and r.influence.size), default=0
    )
    top = 0.0
    for index, (rollout, segments) in enumerate(zip(prompt.rollouts, segments_of, strict=True)):
        base = top - 1.5
        _draw_influence(axis, rollout, base + 0.45, peak)
        for segment in segments:
            _draw_segment(axis, segment, base - segment.leaf)
        _draw_ends(axis, index, rollout, segments, base)
        top = base - len(branches_of(rollout)) - 0.6
    axis.set_ylim(top, 0.2)
    axis.set_xlim(left=-0.5)
    axis.set_yticks([])
    axis.set_xlabel("completion token")
    axis.spines[["top", "right", "left"]].set_visible(False)
    heading = textwrap.wrap(" ".join(problem.split()), TITLE_WIDTH, max_lines=TITLE_LINES, placeholder=" …")
    title = "\n".join([*heading, LEGEND])
    axis.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)  # a $ in a problem is a dollar
    figure.colorbar(ScalarMappable(cmap=VALUES), ax=axis, label="value V(s)", fraction=0.02, pad=0.03)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _draw_influence(axis, rollout, base: float, peak: float) -> None:
    if rollout.influence is None or not peak:
        return
    for (start, end), influence in zip(rollout.step_ranges, rollout.influence, strict=True):
        height = 0.8 * float(influence) / peak
        axis.bar(start, height, width=end - start - 0.3, bottom=base, align="edge", color=BLUE, alpha=0.55)


def _draw_segment(axis, segment, y: float) -> None:
    width = segment.end - segment.start
    colour = VALUES(min(1.0, max(0.0, segment.value)))
    axis.barh(y, width - 0.15, left=segment.start, height=0.7, color=colour, edgecolor=INK, linewidth=0.4)
    ink = "white" if abs(segment.value - 0.5) > 0.35 else INK  # both ends of the map are dark
    label = f"{segment.advantage:+.2f}"
    axis.text(segment.start + width / 2, y, label, ha="center", va="center", fontsize=6.5, color=ink)
    if segment.leaf:
        rise = y + segment.leaf
        axis.plot([segment.start] * 2, [y + 0.35, rise - 0.35], color=INK, linewidth=0.6, alpha=0.5)
        axis.plot(segment.start, rise + 0.42, marker="v", color=INK, markersize=5)


def _draw_ends(axis, index: int, rollout, segments, base: float) -> None:
    rewards = [rollout.reward] + [branch.reward for branch in branches_of(rollout)]
    ends = {segment.leaf: segment.end for segment in segments}
    for leaf, reward in enumerate(rewards):
        axis.text(ends[leaf] + 0.4, base - leaf, f"R={reward:g}", va="center", fontsize=7, color=INK)
    label = f"rollout {index + 1}" + ("" if branches_of(rollout) else " (not expanded)")
    axis.text(-0.6, base, label, ha="right", va="center", fontsize=8, color=INK)
