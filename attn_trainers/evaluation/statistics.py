r"""What an evaluation says: pass@1, pass@k, lengths, their standard errors, tables, and the comparison of two runs.

Pure functions on records (one per completion). The unit is the problem: standard errors and intervals come from
resampling problems, each with all its completions. `attn_trainers.evaluation.run` makes the records.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from ..tables import markdown_table


BOOTSTRAP_DRAWS = 10_000
_LONG_BENCHMARKS = ("aime24", "aime25", "amc23")


@dataclass(frozen=True)
class CompletionRecord:
    """One completion, as it stands in one line of the JSONL file.

    Attributes:
        problem: index of the problem in its file, from 0.
        sample: index of the completion among those of its problem, from 0.
        completion: its text, without special tokens.
        answer: the accepted answer or answers.
        correct: 1.0 or 0.0.
        num_tokens: sampled tokens, the end token included.
        num_thinking_tokens: tokens up to and including the first `</think>`; all if thinking was opened, not closed;
            0 if it was never opened.
        truncated: whether the token limit ended it.
        finish: "stop" or "length".
    """

    problem: int
    sample: int
    completion: str
    answer: str | list[str]
    correct: float
    num_tokens: int
    num_thinking_tokens: int
    truncated: bool
    finish: str


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Summary:
    """Result on one data set.

    Attributes:
        pass_at: k to the mean of unbiased pass@k over problems; 1 is always there: accuracy over all samples.
        truncated: share of completions that the token limit ended.
    """

    name: str
    num_problems: int
    num_samples: int
    pass_at: dict[int, Estimate]
    mean_tokens: Estimate
    median_tokens: float
    mean_thinking_tokens: Estimate
    median_thinking_tokens: float
    truncated: float


@dataclass(frozen=True)
class Comparison:
    """Second run minus first on the same problems.

    Attributes:
        interval: 95 % percentile interval of the difference.
        p_value: two-sided, from the share of resamples on the far side of zero.
    """

    first: float
    second: float
    difference: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float


def default_num_samples(name: str) -> int:
    """Completions per problem of the AttnRL paper (section 4.1): 32 for AIME24, AIME25 and AMC23, 4 for the others."""
    return 32 if name.lower().replace("-", "").replace("_", "") in _LONG_BENCHMARKS else 4


def default_pass_at(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples."""
    return [2**i for i in range(num_samples.bit_length())]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that one of k completions is right, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, equation 1).

    Raises:
        ValueError: if k is not in 1..n, or c is not in 0..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} is outside 1..{num_samples}; draw at least k samples per problem or lower k.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct} is outside 0..{num_samples}; count each sample once.")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def resampled_means(values: Sequence[float], seed: int, draws: int = BOOTSTRAP_DRAWS) -> np.ndarray:
    """(draws,) means of resamples of `values`, drawn with replacement."""
    values = np.asarray(values, dtype=np.float64)  # (N,)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)  # (draws, N)
    return counts @ values / len(values)


def estimate(values: Sequence[float], seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> Estimate:
    """Mean of one value per problem, and the standard deviation of its bootstrap distribution.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("values is empty; an estimate needs at least one problem.")
    return Estimate(fmean(values), float(resampled_means(values, seed, draws).std()))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], seed: int = 0, draws: int = BOOTSTRAP_DRAWS
) -> Comparison:
    """Compare two runs by one value per problem each; a resample takes the same problems from both.

    Raises:
        ValueError: if the runs have different numbers of problems, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"first has {len(first)} problems and second has {len(second)}; both need the same problems, at least one."
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    means = resampled_means(differences, seed, draws)
    # Sums of binary fractions in different order differ in the last digits: that is still no difference.
    tail = min((means <= 1e-12).sum(), (means >= -1e-12).sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(
        first=fmean(first),
        second=fmean(second),
        difference=fmean(differences),
        standard_error=float(means.std()),
        interval=(float(low), float(high)),
        p_value=min(1.0, 2 * float(tail + 1) / (draws + 1)),
    )


def by_problem(records: Sequence[CompletionRecord]) -> list[list[CompletionRecord]]:
    """Records grouped by problem, both in order of their indices.

    Raises:
        ValueError: if a problem has another number of samples than the first, or a sample appears twice.
    """
    groups: dict[int, dict[int, CompletionRecord]] = {}
    for record in records:
        group = groups.setdefault(record.problem, {})
        if record.sample in group:
            raise ValueError(f"problem {record.problem} has sample {record.sample} twice; remove one of the lines.")
        group[record.sample] = record
    sizes = {len(group) for group in groups.values()}
    if len(sizes) > 1:
        raise ValueError(f"problems have {sorted(sizes)} samples; finish the evaluation, it resumes where it stopped.")
    return [[groups[problem][sample] for sample in sorted(groups[problem])] for problem in sorted(groups)]


def accuracy_per_problem(records: Sequence[CompletionRecord]) -> list[float]:
    """Share of right completions of each problem."""
    return [fmean(record.correct for record in group) for group in by_problem(records)]


def summarize(
    name: str, records: Sequence[CompletionRecord], pass_at: Sequence[int] | None = None, seed: int = 0
) -> Summary:
    """Everything the table shows of one data set.

    Args:
        pass_at: values of k besides 1; by default powers of two up to the number of samples.
        seed: of the bootstrap.

    Raises:
        ValueError: if there are no records, samples are missing, or some k exceeds the number of samples.
    """
    if not records:
        raise ValueError(f"{name} has no completions; run the evaluation first.")
    groups = by_problem(records)
    num_samples = len(groups[0])
    ks = sorted({1, *(default_pass_at(num_samples) if pass_at is None else pass_at)})
    right = [sum(record.correct > 0 for record in group) for group in groups]
    lengths = [record.num_tokens for record in records]
    thinking = [record.num_thinking_tokens for record in records]
    return Summary(
        name=name,
        num_problems=len(groups),
        num_samples=num_samples,
        pass_at={k: estimate([pass_at_k(num_samples, c, k) for c in right], seed) for k in ks},
        mean_tokens=estimate([fmean(record.num_tokens for record in group) for group in groups], seed),
        median_tokens=median(lengths),
        mean_thinking_tokens=estimate([fmean(r.num_thinking_tokens for r in group) for group in groups], seed),
        median_thinking_tokens=median(thinking),
        truncated=fmean(record.truncated for record in records),
    )


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} ± {100 * value.standard_error:.1f}"


def _count(value: Estimate) -> str:
    return f"{value.value:.0f} ± {value.standard_error:.0f}"


def summary_table(summaries: Sequence[Summary]) -> str:
    """One row per data set; pass@k in percent, lengths in tokens, ± one standard error. The last row of several is the
    plain mean of pass@1, whose standard error takes the data sets as independent."""
    ks = sorted({k for summary in summaries for k in summary.pass_at})
    header = ["data", "problems", "samples", *(f"pass@{k} %" for k in ks)]
    header += ["tokens, mean", "median", "thinking, mean", "median", "truncated %"]
    rows = []
    for s in summaries:
        cells = [s.name, str(s.num_problems), str(s.num_samples)]
        cells += [_percent(s.pass_at[k]) if k in s.pass_at else "" for k in ks]
        cells += [_count(s.mean_tokens), f"{s.median_tokens:.0f}"]
        cells += [_count(s.mean_thinking_tokens), f"{s.median_thinking_tokens:.0f}", f"{100 * s.truncated:.1f}"]
        rows.append(cells)
    if len(summaries) > 1:
        firsts = [s.pass_at[1] for s in summaries]
        error = math.sqrt(sum(e.standard_error**2 for e in firsts)) / len(firsts)
        mean = _percent(Estimate(fmean(e.value for e in firsts), error))
        rows.append(["mean", "", "", mean, *[""] * (len(header) - 4)])
    return markdown_table(header, rows) + "\n"


def comparison_table(comparisons: dict[str, dict[str, Comparison]]) -> str:
    """One row per data set and quantity: {data: {"pass@1 %" | "tokens": Comparison}}."""
    header = ["data", "quantity", "first", "second", "difference", "95 % interval", "p"]
    rows = []
    for name, quantities in comparisons.items():
        for quantity, c in quantities.items():
            scale, digits = (100, 1) if quantity.endswith("%") else (1, 0)
            first, second, difference, low, high = (
                scale * value for value in (c.first, c.second, c.difference, *c.interval)
            )
            rows.append(
                [
                    name,
                    quantity,
                    f"{first:.{digits}f}",
                    f"{second:.{digits}f}",
                    f"{difference:+.{digits}f} ± {scale * c.standard_error:.{digits}f}",
                    f"[{low:+.{digits}f}, {high:+.{digits}f}]",
                    f"{c.p_value:.3g}",
                ]
            )
    return markdown_table(header, rows) + "\n"
