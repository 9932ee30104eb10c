"""Tables and pictures of a study, from its lines alone: means over seeds, paired differences, curves with bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import ttest_rel
from studies import Study

from attn_trainers.plots import INK
from attn_trainers.tables import markdown_table


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


Records = dict[str, dict[int, dict]]  # arm, seed


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs.

    Attributes:
        mean: of the differences.
        interval: 95 % interval of the mean, by Student's t; `None` from one pair, or from equal ones: there is no
            spread to go by.
        p_value: two-sided; `None` where there is no interval.
        num_pairs: n.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    num_pairs: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Second minus first, pair by pair.

    Raises:
        ValueError: if there are no pairs, or the numbers differ.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"first has {len(first)} and second has {len(second)} values; both need the same seeds.")
    values = np.subtract(second, first)
    count, mean = len(values), float(np.mean(values))
    if np.ptp(values) < 1e-9:  # one pair, or equal ones
        return Difference(mean, None, None, count)
    test = ttest_rel(second, first)
    interval = test.confidence_interval(0.95)
    return Difference(mean, (float(interval.low), float(interval.high)), float(test.pvalue), count)


def curve_values(record: dict, name: str, at: np.ndarray, over: str = "generated_tokens") -> np.ndarray:
    """A run's curve at counts of generated tokens (or of updates), linear between its points."""
    points = record["curve"]
    return np.interp(at, [p[over] for p in points], [p[name] for p in points])


def final_accuracy(study: Study, record: dict) -> float:
    """The primary quantity: held-out accuracy at the budget, which a run exceeds by up to a generation batch; at the
    end of the run where the study has no budget.
    """
    if not study.budget:
        return record["accuracy"]
    return float(curve_values(record, "accuracy", np.array([study.budget]))[0])


def curve_mean(record: dict, budget: int) -> float:
    """Mean accuracy over the tokens up to the budget: the area under the curve, by trapezoids."""
    inner = [p["generated_tokens"] for p in record["curve"] if p["generated_tokens"] < budget]
    tokens = np.array([*inner, budget], dtype=float)
    return float(np.trapezoid(curve_values(record, "accuracy", tokens), tokens) / (budget - tokens[0]))


def paired_seeds(records: Records, arm: str, other: str) -> list[int]:
    """Seeds that both arms have, begun from the same model: warm starts of different CPUs differ, and so their first
    accuracies.
    """
    first, second = records.get(arm, {}), records.get(other, {})
    start = {seed: first[seed]["curve"][0]["accuracy"] for seed in sorted(first)}
    return [seed for seed in start if seed in second and second[seed]["curve"][0]["accuracy"] == start[seed]]


def shared_tokens(study: Study, records: Records) -> int:
    """The budget, or where there is none what the run with the fewest generated tokens sampled."""
    return study.budget or min(r["generated_tokens"] for runs in records.values() for r in runs.values())


def mean_and_error(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and its standard error over seeds; one seed has no error."""
    error = f" ± {scale * np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{error}"


def arms_table(study: Study, records: Records) -> str:
    """One row per arm."""
    header = ["arm", "seeds", "before, %", "accuracy, %", "mean over the run, %", "tokens", "thinking tokens"]
    header += ["generated, million", "updates", "minutes"]
    budget, rows = shared_tokens(study, records), []
    for arm, by_seed in records.items():
        runs = list(by_seed.values())
        rows.append(
            [
                arm,
                len(runs),
                mean_and_error([r["curve"][0]["accuracy"] for r in runs], 100),
                mean_and_error([final_accuracy(study, r) for r in runs], 100),
                mean_and_error([curve_mean(r, budget) for r in runs], 100),
                mean_and_error([r["mean_length"] for r in runs]),
                mean_and_error([r["mean_thinking"] for r in runs]),
                f"{np.mean([r['generated_tokens'] for r in runs]) / 1e6:.3f}",
                f"{np.mean([r['updates'] for r in runs]):.0f}",
                f"{np.mean([r['seconds'] for r in runs]) / 60:.1f}",
            ]
        )
    return markdown_table(header, rows)


def differences_table(study: Study, records: Records) -> str:
    """One row per pair of arms and quantity, over the seeds that both have."""
    budget, rows = shared_tokens(study, records), []
    quantities = {
        "accuracy, points": lambda r, _: 100 * final_accuracy(study, r),
        "mean over the run, points": lambda r, _: 100 * curve_mean(r, budget),
        "thinking tokens, % of the second's": lambda r, base: 100 * r["mean_thinking"] / base["mean_thinking"],
    }
    if study.budget:  # arms make different numbers of updates
        updates = min(r["updates"] for runs in records.values() for r in runs.values())
        quantities[f"accuracy after {updates} updates, points"] = lambda r, _: (
            100 * float(curve_values(r, "accuracy", np.array([updates]), "updates")[0])
        )
    pairs = [(arm, other) for other in study.against for arm in study.arms if arm != other]
    for arm, other in pairs:
        seeds = paired_seeds(records, arm, other)
        for name, value in quantities.items() if seeds else ():
            bases = [records[other][seed] for seed in seeds]
            runs = [records[arm][seed] for seed in seeds]
            d = paired_difference(
                [value(b, b) for b in bases], [value(r, b) for r, b in zip(runs, bases, strict=True)]
            )
            interval = f"[{d.interval[0]:+.1f}, {d.interval[1]:+.1f}]" if d.interval else "–"
            p_value = f"{d.p_value:.3f}" if d.p_value is not None else "–"
            rows.append([f"{arm} − {other}", name, d.num_pairs, f"{d.mean:+.1f}", interval, p_value])
    return markdown_table(["arms", "quantity", "pairs", "difference", "95 % interval", "p"], rows)


def plot(study: Study, records: Records, path: Path) -> None:
    """Mean curves with bands of a standard error over generated tokens, and accuracy against thinking at the end."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    tokens = np.linspace(0, shared_tokens(study, records), 101)
    colours = plt.get_cmap("tab10").colors
    for (arm, by_seed), colour in zip(records.items(), colours, strict=False):
        runs = list(by_seed.values())
        for axis, name, scale in ((axes[0], "accuracy", 100), (axes[1], "mean_thinking", 1)):
            curves = scale * np.array([curve_values(r, name, tokens) for r in runs])  # (seeds, points)
            mean = curves.mean(axis=0)
            axis.plot(tokens / 1e6, mean, color=colour, linewidth=1.6, label=f"{arm} (n = {len(runs)})")
            if len(runs) > 1:
                error = curves.std(axis=0, ddof=1) / len(runs) ** 0.5
                axis.fill_between(tokens / 1e6, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        ends = [(r["mean_thinking"], 100 * final_accuracy(study, r)) for r in runs]
        axes[2].plot(*zip(*ends, strict=True), "o", color=colour, alpha=0.4, markersize=4)
        axes[2].plot(*np.mean(ends, axis=0), "D", color=colour, markersize=8, markeredgecolor="white")
    titles = ("held-out accuracy, %", "thinking tokens", "accuracy, % over thinking tokens at the end")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel("generated tokens, million (band: standard error over seeds)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xlabel("thinking tokens (dots: seeds, diamond: mean)", fontsize=8)
    axes[0].legend(fontsize=8)
    figure.suptitle(study.question, fontsize=11, color=INK)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(name: str, study: Study, records: Records, folder: Path) -> str:
    """Write `NAME.md` and `NAME.png`; the text.

    Args:
        name: of the study.
        study: what was asked.
        records: finished runs by arm, in the order of the study, and seed.
        folder: where to.
    """
    runs = sum(map(len, records.values()))
    budget = f"{study.budget:,} generated tokens a run" if study.budget else "equal updates"
    text = (
        f"# {study.question}\n\n`python benchmarks/run_arms.py --report {name}`: {runs} of "
        f"{len(study.arms) * len(study.seeds)} runs are finished; {budget}, `{study.recipe}`. Mean ± standard error "
        f"over seeds.\n\n{arms_table(study, records)}\n\nPaired by seed, with Student's t:\n\n"
        f"{differences_table(study, records)}\n\n![Curves and ends of the arms]({name}.png)\n"
    )
    (folder / f"{name}.md").write_text(text)
    plot(study, records, folder / f"{name}.png")
    return text
