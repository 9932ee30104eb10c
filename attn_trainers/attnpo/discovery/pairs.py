"""Which pairs of an essential and a redundant step are compared, and what a score of position or length makes of them.

Labels follow position: what comes after the derivation of the answer is redundant, and nothing else nearly ever is.
So over all pairs the score `-index` of a step, which knows nothing of attention, ranks most of them right, and a head
that looks back to the beginning looks like one that tells needed steps from redundant ones. Three criteria differ in
the pairs they compare:

- "matched": pairs of steps that stand close together, the pairs whose essential step comes first and those whose
  redundant step does weighing alike. Any score that only rises or only falls with position has 0.5.
- "before": pairs of steps that both stand before the answer was first derived, where no label is one of position;
  none in a response of which the derivation is not known.
- "all": all pairs, as published.

An example of "matched" with `match_distance=0.2`: in the steps e r e r r of one response neighbours are compared,
(0, 1) and (2, 3) with the essential step first, (2, 1) with the redundant step first. `-index` ranks the first two
right and the third wrong: (2/2 + 0/1) / 2 = 0.5, not 2/3.

H heads, S steps, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


GROUPS = {
    "matched": ("essential step first", "redundant step first"),
    "before": ("both before the derivation",),
    "all": ("all",),
}
"""The groups of pairs of each criterion, which weigh alike."""

CRITERIA = tuple(GROUPS)

BASELINES = ("-index", "index", "length", "-length")
"""Scores that know nothing of attention: earlier, later, longer and shorter steps first."""


@dataclass
class ScoredSteps:
    """Scores and labels of one response's steps.

    Attributes:
        scores: (H, S) attention of the final answer to each step, per head.
        essential: (S,) bool.
        redundant: (S,) bool; a step may be neither.
        lengths: (S,) tokens of each step.
        problem: the problem, to which responses that are resampled together belong.
        derivation: index of the first step that derives the answer, or the number of steps where no label hangs on
            one; None where it is not known.
    """

    scores: Tensor
    essential: Tensor
    redundant: Tensor
    lengths: Tensor
    problem: str
    derivation: int | None = None

    def __post_init__(self):
        steps = (self.scores.shape[-1],)
        shapes = {name: tuple(getattr(self, name).shape) for name in ("essential", "redundant", "lengths")}
        if self.scores.ndim != 2 or set(shapes.values()) != {steps}:
            raise ValueError(f"scores={tuple(self.scores.shape)} must be (heads, steps), and (steps,) all of {shapes}")
        if (self.essential & self.redundant).any():
            raise ValueError("essential and redundant overlap: a step is one, the other or neither")

    def with_scores(self, scores: Tensor) -> "ScoredSteps":
        """The same steps under other scores, (any number, S)."""
        return ScoredSteps(scores, self.essential, self.redundant, self.lengths, self.problem, self.derivation)


StepPairs = tuple[Tensor, Tensor]
"""Indices of the essential and of the redundant steps, (P,) each."""


def step_pairs(response: ScoredSteps, criterion: str, match_distance: float = 0.2) -> list[StepPairs]:
    """The pairs a criterion compares in one response, in groups that weigh alike.

    Args:
        response: labelled steps.
        criterion: one of `CRITERIA`.
        match_distance: for "matched": pairs whose steps are at most this share of the response's steps apart count,
            and neighbours always.

    Returns:
        For "matched" the pairs whose essential step comes first and those whose redundant step does; else one group.

    Raises:
        ValueError: the criterion is unknown.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown; set it to one of {', '.join(CRITERIA)}.")
    essential, redundant = response.essential.nonzero()[:, 0], response.redundant.nonzero()[:, 0]
    first = essential.repeat_interleave(len(redundant))  # (P,)
    second = redundant.repeat(len(essential))
    if criterion == "matched":
        limit = max(1, int(match_distance * len(response.essential)))
        near = (first - second).abs() <= limit
        return [(first[one], second[one]) for one in (near & (first < second), near & (first > second))]
    if criterion == "before":
        early = torch.maximum(first, second) < (response.derivation or 0)
        return [(first[early], second[early])]
    return [(first, second)]


def pair_accuracy(scores: Tensor, pairs: StepPairs) -> Tensor:
    """Share of pairs in which the essential step has the higher score, ties counting half.

    Args:
        scores: (H, S).
        pairs: at least one pair.

    Returns:
        (H,) float64 in [0, 1].
    """
    essential, redundant = scores[:, pairs[0]], scores[:, pairs[1]]  # (H, P)
    twice = (essential > redundant).sum(-1) + (essential >= redundant).sum(-1)
    return twice.double() / (2 * essential.shape[1])


def baseline_scores(response: ScoredSteps) -> Tensor:
    """(4, S) float64 scores in the order of `BASELINES`."""
    index = torch.arange(len(response.lengths), dtype=torch.float64)
    length = response.lengths.double()
    return torch.stack([-index, index, length, -length])
