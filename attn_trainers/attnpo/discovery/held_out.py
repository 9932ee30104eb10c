"""How good the chosen heads are on problems that had no part in choosing them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .pairs import ScoredSteps
from .ranking import RankingOptions, criterion_report


@dataclass
class HeldOutReport:
    """SRA on problems that had no part in choosing the heads.

    Attributes:
        criterion: pairs that are compared: those the heads are ranked by, or "all" where held-out responses lack them.
        num_responses: responses with a pair to compare.
        num_pairs: pairs in each group of the criterion.
        chosen: SRA of the chosen heads together (mean score).
        lower: lower end of its bootstrap interval (95 %, over problems).
        upper: upper end.
        best_single: SRA of the head that ranked first.
        median: SRA of the median head.
        share_below: share of the heads whose SRA is below that of the chosen ones together.
        baselines: SRA and interval of scores that know nothing of attention.
    """

    criterion: str
    num_responses: int
    num_pairs: list[int]
    chosen: float
    lower: float
    upper: float
    best_single: float
    median: float
    share_below: float
    baselines: dict[str, list[float]]


def is_held_out(problem: str, share: float, seed: int) -> bool:
    """Whether a problem belongs to the held-out share, by a hash of its text."""
    digest = hashlib.sha256(f"{seed}:{problem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def measure_held_out(
    responses: Sequence[ScoredSteps],
    chosen: Sequence[int],
    criterion: str,
    options: RankingOptions,
    generator: torch.Generator,
) -> HeldOutReport | None:
    """SRA of the chosen heads (flat indices, best first) and of all single heads on held-out responses.

    None if no held-out response has both kinds of step.
    """
    extended = [
        one.with_scores(torch.cat([one.scores.double(), one.scores[list(chosen)].double().mean(0, keepdim=True)]))
        for one in responses
    ]
    for used in dict.fromkeys((criterion, "all")):
        report = criterion_report(extended, used, options, generator)
        if report.sra:
            *single, together = report.sra
            return HeldOutReport(
                criterion=used,
                num_responses=report.num_responses,
                num_pairs=report.num_pairs,
                chosen=together,
                lower=report.lower[-1],
                upper=report.upper[-1],
                best_single=single[chosen[0]],
                median=torch.tensor(single).median().item(),
                share_below=sum(value < together for value in single) / len(single),
                baselines=report.baselines,
            )
    return None
