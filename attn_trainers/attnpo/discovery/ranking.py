"""How well attention heads tell essential steps from redundant ones: step ranking accuracy (SRA).

Source: AttnPO (arXiv 2602.09953). The paper's formula was not at hand; this is the reading under which a head that
ignores the difference scores 0.5, as is reported for most heads. Which pairs of steps are compared is a criterion
(`pairs`); heads are ranked by the one that position cannot win, where there are pairs enough.

Heads are numbered flat here, layer · heads-per-layer + head. H heads, R responses, G groups of pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bootstrap import interval_ends, problem_numbers, resampled_counts
from .pairs import BASELINES, CRITERIA, GROUPS, ScoredSteps, baseline_scores, pair_accuracy, step_pairs


SraOf = Callable[[Sequence[ScoredSteps]], Tensor]
"""SRA of each row of scores, (rows,) float64, over responses."""


@dataclass(frozen=True)
class RankingOptions:
    """How pairs become a ranking.

    Attributes:
        average: "macro" weighs responses alike, "micro" weighs pairs alike.
        criterion: one of `CRITERIA`, or "auto": the first of them with pairs enough.
        match_distance: as for `step_pairs`.
        min_pairs: pairs that "auto" demands, in each group of the criterion.
    """

    average: str = "macro"
    criterion: str = "auto"
    match_distance: float = 0.2
    min_pairs: int = 50

    def __post_init__(self):
        for name, allowed in (("average", ("macro", "micro")), ("criterion", ("auto", *CRITERIA))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; set it to one of {', '.join(allowed)}.")
        if not 0.0 < self.match_distance <= 1.0:
            raise ValueError(
                f"match_distance={self.match_distance} must lie in (0, 1]; set it to a share of the steps."
            )
        if self.min_pairs < 1:
            raise ValueError(f"min_pairs={self.min_pairs} must be at least 1.")


@dataclass
class RankingTable:
    """Accuracy of each head on each response that has a pair to compare.

    Attributes:
        accuracies: (R, G, H) float64; 0 where a group has no pair.
        num_pairs: (R, G) float64, pairs compared.
        problems: (R,) long, number of the response's problem.
    """

    accuracies: Tensor
    num_pairs: Tensor
    problems: Tensor

    @property
    def pairs_by_group(self) -> list[int]:
        return [int(count) for count in self.num_pairs.sum(0)]

    def mean(self, average: str = "macro") -> Tensor:
        """(H,) SRA: the mean over responses ("macro") or pairs ("micro") of each group, then over groups.

        NaN where a group has no pair.
        """
        return self._means(self.weights(average)[None])[0]

    def weights(self, average: str) -> Tensor:
        """(R, G) weight of each response in each group."""
        return self.num_pairs if average == "micro" else (self.num_pairs > 0).double()

    def _means(self, weights: Tensor) -> Tensor:
        """(N, H) SRA under N weightings (N, R, G)."""
        groups = range(self.num_pairs.shape[1])
        sums = [weights[:, :, g] @ self.accuracies[:, g] / weights[:, :, g].sum(1, keepdim=True) for g in groups]
        return torch.stack(sums).mean(0)

    def interval(
        self, generator: torch.Generator, *, average: str = "macro", samples: int = 1000, coverage: float = 0.95
    ) -> tuple[Tensor, Tensor]:
        """Bootstrap interval of `mean` over problems: the responses of one problem are drawn together.

        Args:
            generator: source of the resampling.
            average: as in `mean`.
            samples: number of resamplings; those in which a group has no pair are left out.
            coverage: share of them between the ends.

        Returns:
            Lower and upper end, (H,) each.
        """
        counts = resampled_counts(self.problems, samples, generator)
        return interval_ends(self._means(counts[:, :, None] * self.weights(average)), coverage)


@dataclass
class CriterionReport:
    """SRA of all heads, and of scores that know nothing of attention, on the pairs of one criterion.

    Attributes:
        num_problems: problems with a pair.
        num_responses: responses with a pair.
        num_pairs: pairs in each group ("matched": essential step first, redundant step first).
        sra: SRA of each head, flat; empty where a group has no pair.
        lower: lower end of its bootstrap interval (95 %, over problems).
        upper: upper end.
        baselines: the same three numbers of each of `BASELINES`.
    """

    num_problems: int
    num_responses: int
    num_pairs: list[int]
    sra: list[float]
    lower: list[float]
    upper: list[float]
    baselines: dict[str, list[float]]


def ranking_table(
    responses: Sequence[ScoredSteps], criterion: str = "all", match_distance: float = 0.2
) -> RankingTable:
    """Accuracy of every head on every response that has a pair to compare."""
    rows, problems = [], []  # (G, H) accuracies and pairs of each group
    for one in responses:
        groups = step_pairs(one, criterion, match_distance)
        sizes = [len(essential) for essential, _ in groups]
        if any(sizes):
            none = torch.zeros(len(one.scores), dtype=torch.float64)
            accuracies = [pair_accuracy(one.scores, pairs) if len(pairs[0]) else none for pairs in groups]
            rows.append((torch.stack(accuracies), torch.tensor(sizes, dtype=torch.float64)))
            problems.append(one.problem)
    if not rows:
        groups = len(GROUPS[criterion])
        return RankingTable(torch.zeros(0, groups, 0), torch.zeros(0, groups), problem_numbers([]))
    accuracies, num_pairs = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return RankingTable(accuracies, num_pairs, problem_numbers(problems))


def criterion_report(
    responses: Sequence[ScoredSteps], criterion: str, options: RankingOptions, generator: torch.Generator
) -> CriterionReport:
    """SRA of all heads and baselines, with intervals; empty where a group of the criterion has no pair."""
    beside = [one.with_scores(torch.cat([one.scores.double(), baseline_scores(one)])) for one in responses]
    table = ranking_table(beside, criterion, options.match_distance)
    size = (len(table.problems.unique()), len(table.problems), table.pairs_by_group)
    if 0 in table.pairs_by_group:
        return CriterionReport(*size, [], [], [], {})
    sra = table.mean(options.average).tolist()
    lower, upper = (end.tolist() for end in table.interval(generator, average=options.average))
    heads = len(sra) - len(BASELINES)
    rows = zip(sra[heads:], lower[heads:], upper[heads:], strict=True)
    baselines = {name: list(row) for name, row in zip(BASELINES, rows, strict=True)}
    return CriterionReport(*size, sra[:heads], lower[:heads], upper[:heads], baselines)


def choose_criterion(criteria: dict[str, CriterionReport], options: RankingOptions) -> tuple[str, str]:
    """The criterion that heads are ranked by, and a note where it is not "matched".

    Raises:
        ValueError: the criterion that is asked for, or every criterion, has no pair to compare.
    """
    if options.criterion != "auto":
        if not criteria[options.criterion].sra:
            raise ValueError(
                f"criterion={options.criterion!r} has {criteria[options.criterion].num_pairs} pairs, too few to rank "
                "by; label more responses, or set criterion='auto'."
            )
        chosen = options.criterion
    else:
        enough = [name for name in CRITERIA if min(criteria[name].num_pairs) >= options.min_pairs]
        chosen = enough[0] if enough else "all"
    if not criteria[chosen].sra:
        raise ValueError(
            "no response has both an essential and a redundant step: label more responses, or change the thresholds "
            "of the labels."
        )
    if chosen == "matched":
        return chosen, ""
    baselines = criteria[chosen].baselines
    best = max(baselines, key=lambda name: baselines[name][0])
    pairs = " + ".join(map(str, criteria["matched"].num_pairs))
    return chosen, (
        f"Heads are ranked by criterion {chosen!r}, not by position-matched pairs (of which there are {pairs}; "
        f"{options.min_pairs} of each order are asked for). On its pairs the score {best!r}, which knows nothing of "
        f"attention, has {baselines[best][0]:.3f}: a head is worth something only above that."
    )


def top_k_ensembles(
    sra_of: SraOf, responses: Sequence[ScoredSteps], ranking: Sequence[int], *, max_heads: int = 10
) -> list[float]:
    """SRA of the mean score of the first 1, 2, ..., max_heads heads of a ranking.

    Args:
        sra_of: what measures the responses.
        responses: scored and labelled responses.
        ranking: flat head indices, best first.
        max_heads: largest ensemble.
    """
    first = list(ranking)[:max_heads]
    # A sum ranks steps as a mean does.
    return sra_of([one.with_scores(one.scores[first].double().cumsum(0)) for one in responses]).tolist()


def greedy_ensemble(
    sra_of: SraOf, responses: Sequence[ScoredSteps], candidates: Sequence[int], *, max_heads: int = 10
) -> tuple[list[int], list[float]]:
    """Add, one at a time, the head that raises the SRA of the mean score most (or lowers it least).

    Args:
        sra_of: what measures the responses.
        responses: scored and labelled responses.
        candidates: flat indices of the heads to choose from, those named first winning ties.
        max_heads: heads to choose.

    Returns:
        Flat indices in the order chosen, and the SRA of the ensemble after each.
    """
    remaining = list(candidates)
    totals = [torch.zeros(one.scores.shape[1], dtype=torch.float64) for one in responses]
    chosen, accuracies = [], []
    while remaining and len(chosen) < max_heads:
        extended = [
            one.with_scores(one.scores[remaining].double() + total)
            for one, total in zip(responses, totals, strict=True)
        ]
        means = sra_of(extended)  # (remaining,)
        best = int(means.argmax())
        totals = [one.scores[best] for one in extended]
        chosen.append(remaining.pop(best))
        accuracies.append(float(means[best]))
    return chosen, accuracies
