"""The result of a head discovery: every head on every criterion, the ranking, and ensembles of its best."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .intervention import InterventionReport
from .pairs import CRITERIA, ScoredSteps
from .ranking import (
    CriterionReport,
    RankingOptions,
    choose_criterion,
    criterion_report,
    greedy_ensemble,
    ranking_table,
    top_k_ensembles,
)


@dataclass
class HeadReport:
    """Result of a head discovery.

    Attributes:
        model_name: the model probed.
        num_layers: its layers.
        num_heads: attention heads in each.
        average: "macro" or "micro".
        criterion: the criterion that heads are ranked by.
        note: why it is not "matched", and what that means; empty where it is.
        criteria: what each criterion says.
        ranking: heads [layer, head], best first.
        greedy_heads: heads [layer, head] in the order a greedy search adds them.
        greedy_sra: SRA of the first 1, 2, ... of them together.
        top_k_sra: SRA of the first 1, 2, ... heads of the ranking together.
        chosen: the heads that were chosen, best first.
        intervention: what hiding steps from them does to the answer; None where it was not tried.
    """

    model_name: str
    num_layers: int
    num_heads: int
    average: str
    criterion: str
    note: str
    criteria: dict[str, CriterionReport]
    ranking: list[list[int]]
    greedy_heads: list[list[int]]
    greedy_sra: list[float]
    top_k_sra: list[float]
    chosen: list[list[int]] = field(default_factory=list)
    intervention: InterventionReport | None = None

    @property
    def ranked_by(self) -> CriterionReport:
        """The numbers behind the ranking."""
        return self.criteria[self.criterion]

    @classmethod
    def from_dict(cls, record: dict) -> "HeadReport":
        """From `to_dict`; other fields of the record are left out."""
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        fields["criteria"] = {name: CriterionReport(**values) for name, values in record["criteria"].items()}
        if record["intervention"]:
            fields["intervention"] = InterventionReport(**record["intervention"])
        return cls(**fields)

    def to_dict(self) -> dict:
        """For a JSON file."""
        return asdict(self)

    def count_above(self, threshold: float) -> int:
        """Number of heads whose SRA is above a threshold."""
        return sum(value > threshold for value in self.ranked_by.sra)


def build_report(
    responses: Sequence[ScoredSteps],
    *,
    model_name: str,
    num_layers: int,
    num_heads: int,
    generator: torch.Generator,
    options: RankingOptions | None = None,
    max_heads: int = 10,
    greedy_candidates: int = 64,
) -> HeadReport:
    """Rank all heads of a model and its ensembles.

    Args:
        responses: scored and labelled responses, scores of all num_layers · num_heads heads.
        model_name: for the record.
        num_layers: layers of the model.
        num_heads: attention heads in a layer.
        generator: source of the bootstrap.
        options: how pairs become a ranking.
        max_heads: largest ensemble.
        greedy_candidates: the greedy search chooses among this many best single heads.

    Raises:
        ValueError: the scores have another number of heads, or there are no pairs to compare.
    """
    options = options or RankingOptions()
    for one in responses:
        if one.scores.shape[0] != num_layers * num_heads:
            raise ValueError(f"scores of {one.scores.shape[0]} heads, but {num_layers} layers of {num_heads} heads")
    criteria = {name: criterion_report(responses, name, options, generator) for name in CRITERIA}
    criterion, note = choose_criterion(criteria, options)

    def sra_of(rescored: Sequence[ScoredSteps]) -> Tensor:
        return ranking_table(rescored, criterion, options.match_distance).mean(options.average)

    sra = torch.tensor(criteria[criterion].sra, dtype=torch.float64)
    ranking = sra.argsort(descending=True, stable=True).tolist()
    greedy, greedy_sra = greedy_ensemble(sra_of, responses, ranking[:greedy_candidates], max_heads=max_heads)
    return HeadReport(
        model_name=model_name,
        num_layers=num_layers,
        num_heads=num_heads,
        average=options.average,
        criterion=criterion,
        note=note,
        criteria=criteria,
        ranking=[list(divmod(index, num_heads)) for index in ranking],
        greedy_heads=[list(divmod(index, num_heads)) for index in greedy],
        greedy_sra=greedy_sra,
        top_k_sra=top_k_ensembles(sra_of, responses, ranking, max_heads=max_heads),
    )
