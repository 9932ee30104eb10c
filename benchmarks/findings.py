"""The README's picture: what each method's training runs showed, from the lines of `results/` alone.

    python benchmarks/findings.py            # writes docs/findings.png and prints the claims with their intervals

One panel a study: held-out accuracy of arms against the arm they are to beat, paired by seed with 95 % intervals by
Student's t, and for AttnPO accuracy over thinking tokens. A study without runs has no panel.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from arm_report import Difference, Records, final_accuracy, paired_difference, paired_seeds
from run_arms import RESULTS, ROOT, finished, planned
from studies import STUDIES, Study

from attn_trainers.jsonl import read_jsonl
from attn_trainers.plots import BLUE, INK
from attn_trainers.tables import markdown_table


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


# Study to its title and the pairs of arms whose difference in accuracy is shown.
PAIRS = {
    "branching": (
        "Attention branching",
        [("attention", other) for other in ("outcome", "random", "entropy", "first_steps")] + [("oracle", "random")],
    ),
    "rhythm": (
        "Rhythm credit",
        [("coupled", "random"), ("local", "random"), ("global", "random"), ("entropy", "random"), ("random", "none")],
    ),
    "composition": (
        "Trees with credit",
        [("trees+rhythm", "trees+random"), ("trees+rhythm", "trees"), ("trees+attnpo", "trees")],
    ),
}
SPREADS = {"length": "Step credit (AttnPO)"}


def differences(study: Study, records: Records, pairs: Iterable[tuple[str, str]]) -> dict[str, Difference]:
    """Accuracy (`final_accuracy`) in points, first arm minus second, of the pairs that have runs of the same seeds."""
    found = {}
    for arm, other in pairs:
        seeds = paired_seeds(records, arm, other)
        if seeds:
            values = [[100 * final_accuracy(study, records[name][seed]) for seed in seeds] for name in (other, arm)]
            found[f"{arm} − {other}"] = paired_difference(*values)
    return found


def draw_differences(axis, title: str, found: dict[str, Difference]) -> None:
    """Each difference as a dot with its interval; the line is no difference."""
    for row, d in enumerate(found.values()):
        low, high = d.interval or (d.mean, d.mean)
        clear = d.interval is not None and (low > 0 or high < 0)
        axis.plot([low, high], [row, row], color=INK, linewidth=1.5)
        axis.plot(d.mean, row, "o", color=BLUE if clear else "white", markeredgecolor=INK, markersize=7)
    axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(found)), [f"{name}  (n = {d.num_pairs})" for name, d in found.items()])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel("difference in held-out accuracy, points\n(95 % interval; filled: zero is outside)", fontsize=8)


def draw_spread(axis, title: str, records: Records) -> None:
    """Accuracy over thinking tokens at the end, a dot a seed; the cross is where all began."""
    start = next(iter(next(iter(records.values())).values()))["curve"][0]
    axis.plot(start["mean_thinking"], 100 * start["accuracy"], "x", color=INK, markersize=8, label="before")
    for arm, runs in records.items():
        ends = [(r["mean_thinking"], 100 * r["accuracy"]) for r in runs.values()]
        (dots,) = axis.plot(*zip(*ends, strict=True), "o", alpha=0.4, markersize=4)
        axis.plot(
            *np.mean(ends, axis=0),
            "D",
            color=dots.get_color(),
            markersize=8,
            markeredgecolor="white",
            label=f"{arm} (n = {len(ends)})",
        )
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel("thinking tokens (dots: seeds, diamond: mean)", fontsize=8)
    axis.set_ylabel("held-out accuracy, %", fontsize=8)


def counted_runs(name: str) -> Records:
    """The finished runs of a study that count."""
    records, _ = finished(STUDIES[name], read_jsonl(RESULTS / f"{name}.jsonl", repair=True))
    return planned(STUDIES[name], records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "findings.png", help="the picture")
    args = parser.parse_args()
    panels = {name: counted_runs(name) for name in STUDIES if name in PAIRS | SPREADS}
    panels = {name: records for name, records in panels.items() if records}
    if not panels:
        raise SystemExit(f"No study has a finished run in {RESULTS}.")
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    rows = []
    for axis, (name, records) in zip(axes[0], panels.items(), strict=True):
        if name in SPREADS:
            draw_spread(axis, SPREADS[name], records)
        else:
            title, pairs = PAIRS[name]
            found = differences(STUDIES[name], records, pairs)
            draw_differences(axis, title, found)
            for pair, d in found.items():
                interval = f"{d.interval[0]:+.1f} to {d.interval[1]:+.1f}" if d.interval else "–"
                rows.append([title, pair, f"{d.mean:+.1f}", interval, d.num_pairs])
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.output, dpi=130)
    print(markdown_table(["study", "arms", "points", "95 % interval", "seeds"], rows))
    print(f"Picture: {args.output}")


if __name__ == "__main__":
    main()
