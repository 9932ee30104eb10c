"""How the ranking of heads moved between two models of one shape, such as before and after training.

The paper (arXiv 2602.09953) reports a correlation above 0.85 over training, which is why its heads are found once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...attention.heads import jaccard
from .pairs import CRITERIA
from .report import HeadReport


@dataclass
class HeadComparison:
    """Two rankings of the heads of one shape.

    Attributes:
        first_model, second_model: the models.
        num_layers: layers of both.
        num_heads: attention heads in each layer.
        criterion: pairs of steps on which both are measured.
        pearson: correlation of the SRA over heads.
        spearman: correlation of the ranks.
        first_heads, second_heads: the heads that were chosen in each.
        num_shared: heads chosen in both.
        overlap: share of the heads chosen in either that are chosen in both.
        first_sra, second_sra: SRA of each head, flat.
    """

    first_model: str
    second_model: str
    num_layers: int
    num_heads: int
    criterion: str
    pearson: float
    spearman: float
    first_heads: list[list[int]]
    second_heads: list[list[int]]
    num_shared: int
    overlap: float
    first_sra: list[float]
    second_sra: list[float]


def compare_heads(first: str | Path, second: str | Path) -> HeadComparison:
    """Compare two discoveries.

    Measured on the criterion that both rank by, else on the first of `CRITERIA` for which both have pairs.

    Args:
        first: output folder of a discovery.
        second: that of another, of a model with as many layers and heads.

    Raises:
        ValueError: a folder holds no report, or the models differ in shape.
    """
    a, b = _read(first), _read(second)
    if (a.num_layers, a.num_heads) != (b.num_layers, b.num_heads):
        raise ValueError(
            f"compare={str(first)!r} has {a.num_layers} layers of {a.num_heads} heads, {str(second)!r} {b.num_layers} "
            f"of {b.num_heads}; compare models of one shape."
        )
    preferred = [a.criterion] if a.criterion == b.criterion else CRITERIA
    criterion = next(name for name in (*preferred, "all") if a.criteria[name].sra and b.criteria[name].sra)
    x, y = (torch.tensor(one.criteria[criterion].sra, dtype=torch.float64) for one in (a, b))
    ours, theirs = ({tuple(head) for head in one.chosen} for one in (a, b))
    return HeadComparison(
        first_model=a.model_name,
        second_model=b.model_name,
        num_layers=a.num_layers,
        num_heads=a.num_heads,
        criterion=criterion,
        pearson=_correlation(x, y),
        spearman=_correlation(_ranks(x), _ranks(y)),
        first_heads=a.chosen,
        second_heads=b.chosen,
        num_shared=len(ours & theirs),
        overlap=jaccard(ours, theirs),
        first_sra=x.tolist(),
        second_sra=y.tolist(),
    )


def _read(folder: str | Path) -> HeadReport:
    path = Path(folder) / "report.json"
    if not path.exists():
        raise ValueError(f"compare={str(folder)!r} holds no report.json; give the output folder of a head discovery.")
    return HeadReport.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on, ties at their mean."""
    below = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return below + (equal - 1) / 2.0
