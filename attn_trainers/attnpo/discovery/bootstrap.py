"""Bootstrap intervals over problems: the responses to one problem are alike, so they are drawn together."""

from collections.abc import Sequence

import torch
from torch import Tensor


def resampled_counts(problems: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """(samples, R) float64: how often each response is in each bootstrap sample of problems.

    Args:
        problems: (R,) long, number of the response's problem, from 0 on.
        samples: number of resamplings.
        generator: their source.
    """
    number = int(problems.max()) + 1
    drawn = torch.randint(number, (samples, number), generator=generator)
    counts = torch.zeros(samples, number, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))[:, problems]


def interval_ends(means: Tensor, coverage: float = 0.95) -> tuple[Tensor, Tensor]:
    """Lower and upper quantile, (H,) each, of bootstrap means (samples, H), those that are NaN left out."""
    tail = (1.0 - coverage) / 2
    ends = torch.nanquantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64), dim=0)
    return ends[0], ends[1]


def problem_numbers(problems: Sequence[str]) -> Tensor:
    """(R,) long: the number of each problem, in the order in which they first appear."""
    number_of = {problem: number for number, problem in enumerate(dict.fromkeys(problems))}
    return torch.tensor([number_of[problem] for problem in problems], dtype=torch.long)
