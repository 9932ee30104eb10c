"""How well attention heads tell essential steps from redundant ones: step ranking accuracy (SRA).

Source: AttnPO (arXiv 2602.09953). The paper's formula was not at hand; this is the reading under which a head that
ignores the difference scores 0.5, as is reported for most heads.

Heads are numbered flat here, layer · heads-per-layer + head. H heads, S steps, R responses.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass
class ScoredSteps:
    """Scores and labels of one response's steps.

    Attributes:
        scores: (H, S) attention of the final answer to each step, per head.
        essential: (S,) bool.
        redundant: (S,) bool; a step may be neither.
    """

    scores: Tensor
    essential: Tensor
    redundant: Tensor

    def __post_init__(self):
        steps = self.scores.shape[-1]
        if self.scores.ndim != 2 or self.essential.shape != (steps,) or self.redundant.shape != (steps,):
            raise ValueError(
                f"scores {tuple(self.scores.shape)} must be (heads, steps), essential {tuple(self.essential.shape)} "
                f"and redundant {tuple(self.redundant.shape)} (steps,)"
            )
        if (self.essential & self.redundant).any():
            raise ValueError("essential and redundant overlap: a step is one, the other or neither")

    @property
    def num_pairs(self) -> int:
        """Pairs of an essential and a redundant step; a response without any says nothing about heads."""
        return int(self.essential.sum()) * int(self.redundant.sum())


@dataclass
class RankingTable:
    """SRA of each head on each response that has both kinds of step.

    Attributes:
        accuracies: (R, H) float64.
        num_pairs: (R,) float64, pairs compared in each response.
    """

    accuracies: Tensor
    num_pairs: Tensor

    def mean(self, average: str = "macro") -> Tensor:
        """(H,) SRA over all responses: "macro" weighs responses alike, "micro" weighs pairs alike."""
        weights = self.weights(average)
        return weights @ self.accuracies / weights.sum()

    def weights(self, average: str) -> Tensor:
        """(R,) weight of each response."""
        if average not in ("macro", "micro"):
            raise ValueError(f"average={average!r} must be 'macro' or 'micro'")
        return self.num_pairs if average == "micro" else torch.ones_like(self.num_pairs)

    def interval(
        self, generator: torch.Generator, *, average: str = "macro", samples: int = 1000, coverage: float = 0.95
    ) -> tuple[Tensor, Tensor]:
        """Bootstrap interval of `mean` over responses.

        Args:
            generator: Source of the resampling.
            average: As in `mean`.
            samples: Number of resamplings.
            coverage: Share of them between the ends.

        Returns:
            Lower and upper end, (H,) each.
        """
        responses = len(self.num_pairs)
        drawn = torch.randint(responses, (samples, responses), generator=generator)
        counts = torch.zeros(samples, responses, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        weights = counts * self.weights(average)
        means = weights @ self.accuracies / weights.sum(1, keepdim=True)  # (samples, H)
        tail = (1.0 - coverage) / 2
        ends = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64), dim=0)
        return ends[0], ends[1]


@dataclass
class HeadReport:
    """Result of a head discovery.

    Attributes:
        model_name: The model probed.
        num_layers: Its layers.
        num_heads: Attention heads in each.
        num_responses: Responses with both kinds of step.
        num_pairs: Pairs of steps compared.
        average: "macro" or "micro".
        sra: SRA of each head, flat.
        lower: Lower end of its bootstrap interval.
        upper: Upper end.
        ranking: Heads [layer, head], best first.
        greedy_heads: Heads [layer, head] in the order a greedy search adds them.
        greedy_sra: SRA of the first 1, 2, ... of them together.
        top_k_sra: SRA of the first 1, 2, ... heads of the ranking together.
    """

    model_name: str
    num_layers: int
    num_heads: int
    num_responses: int
    num_pairs: int
    average: str
    sra: list[float]
    lower: list[float]
    upper: list[float]
    ranking: list[list[int]]
    greedy_heads: list[list[int]]
    greedy_sra: list[float]
    top_k_sra: list[float]

    def to_dict(self) -> dict:
        """For a JSON file."""
        return asdict(self)

    def count_above(self, threshold: float) -> int:
        """Number of heads whose SRA is above a threshold."""
        return sum(value > threshold for value in self.sra)


def step_ranking_accuracy(scores: Tensor, essential: Tensor, redundant: Tensor) -> Tensor:
    """SRA: share of (essential, redundant) pairs in which the essential step has the higher score, ties counting half.

    Sorted search instead of all pairs: O(S log S) per head.

    Args:
        scores: (H, S) score of each step under each head.
        essential: (S,) bool.
        redundant: (S,) bool.

    Returns:
        (H,) float64 in [0, 1].

    Raises:
        ValueError: No step is essential, or none redundant.
    """
    if not essential.any() or not redundant.any():
        raise ValueError("step ranking accuracy needs an essential and a redundant step: leave this response out")
    queries = scores[:, essential].contiguous()  # (H, E)
    ordered = scores[:, redundant].sort(dim=-1).values  # (H, R)
    below = torch.searchsorted(ordered, queries, right=False)
    not_above = torch.searchsorted(ordered, queries, right=True)
    return (below + not_above).double().mean(-1) / (2 * ordered.shape[-1])


def ranking_table(responses: Sequence[ScoredSteps]) -> RankingTable:
    """SRA of every head on every response that has both kinds of step.

    Raises:
        ValueError: No response has both.
    """
    usable = rankable(responses)
    accuracies = [step_ranking_accuracy(one.scores, one.essential, one.redundant) for one in usable]
    num_pairs = torch.tensor([one.num_pairs for one in usable], dtype=torch.float64)
    return RankingTable(torch.stack(accuracies), num_pairs)


def rankable(responses: Sequence[ScoredSteps]) -> list[ScoredSteps]:
    """The responses that have an essential and a redundant step.

    Raises:
        ValueError: There is none.
    """
    usable = [one for one in responses if one.num_pairs > 0]
    if not usable:
        raise ValueError(f"none of {len(responses)} responses has both an essential and a redundant step: label more")
    return usable


def top_k_ensembles(
    responses: Sequence[ScoredSteps], ranking: Sequence[int], *, max_heads: int = 10, average: str = "macro"
) -> Tensor:
    """SRA of the mean score of the first 1, 2, ..., max_heads heads of a ranking.

    Args:
        responses: Scored and labelled responses.
        ranking: Flat head indices, best first.
        max_heads: Largest ensemble.
        average: "macro" or "micro".

    Returns:
        (min(max_heads, len(ranking)),) float64.
    """
    first = list(ranking)[:max_heads]
    # A sum ranks steps as a mean does.
    summed = [ScoredSteps(one.scores[first].double().cumsum(0), one.essential, one.redundant) for one in responses]
    return ranking_table(summed).mean(average)


def greedy_ensemble(
    responses: Sequence[ScoredSteps],
    *,
    max_heads: int = 10,
    average: str = "macro",
    candidates: Sequence[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Add, one at a time, the head that raises the SRA of the mean score most (or lowers it least).

    Args:
        responses: Scored and labelled responses.
        max_heads: Heads to choose.
        average: "macro" or "micro".
        candidates: Flat indices of the heads to choose from, those named first winning ties; default all.

    Returns:
        Flat indices in the order chosen, and the SRA of the ensemble after each.
    """
    usable = rankable(responses)
    remaining = list(range(usable[0].scores.shape[0])) if candidates is None else list(candidates)
    totals = [torch.zeros(one.scores.shape[1], dtype=torch.float64) for one in usable]
    chosen, accuracies = [], []
    while remaining and len(chosen) < max_heads:
        extended = [
            ScoredSteps(one.scores[remaining].double() + total, one.essential, one.redundant)
            for one, total in zip(usable, totals, strict=True)
        ]
        means = ranking_table(extended).mean(average)  # (remaining,)
        best = int(means.argmax())
        totals = [one.scores[best] for one in extended]
        chosen.append(remaining.pop(best))
        accuracies.append(float(means[best]))
    return chosen, accuracies


def build_report(
    responses: Sequence[ScoredSteps],
    *,
    model_name: str,
    num_layers: int,
    num_heads: int,
    generator: torch.Generator,
    average: str = "macro",
    max_heads: int = 10,
    greedy_candidates: int = 64,
) -> HeadReport:
    """Rank all heads of a model and its ensembles.

    Args:
        responses: Scored and labelled responses, scores of all num_layers · num_heads heads.
        model_name: For the record.
        num_layers: Layers of the model.
        num_heads: Attention heads in a layer.
        generator: Source of the bootstrap.
        average: "macro" or "micro".
        max_heads: Largest ensemble.
        greedy_candidates: The greedy search chooses among this many best single heads.

    Raises:
        ValueError: The scores have another number of heads, or no response has both kinds of step.
    """
    usable = rankable(responses)
    for one in usable:
        if one.scores.shape[0] != num_layers * num_heads:
            raise ValueError(f"scores of {one.scores.shape[0]} heads, but {num_layers} layers of {num_heads} heads")
    table = ranking_table(usable)
    sra = table.mean(average)
    lower, upper = table.interval(generator, average=average)
    ranking = sra.argsort(descending=True, stable=True).tolist()
    greedy, greedy_sra = greedy_ensemble(
        usable, max_heads=max_heads, average=average, candidates=ranking[:greedy_candidates]
    )
    return HeadReport(
        model_name=model_name,
        num_layers=num_layers,
        num_heads=num_heads,
        num_responses=len(usable),
        num_pairs=int(table.num_pairs.sum()),
        average=average,
        sra=sra.tolist(),
        lower=lower.tolist(),
        upper=upper.tolist(),
        ranking=[list(divmod(index, num_heads)) for index in ranking],
        greedy_heads=[list(divmod(index, num_heads)) for index in greedy],
        greedy_sra=greedy_sra,
        top_k_sra=top_k_ensembles(usable, ranking, max_heads=max_heads, average=average).tolist(),
    )
