"""What is known of a prompt on its way through the pipeline: its rollouts, stage by stage, and their branches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from .exploration import BranchPoints
from .pipeline import Draw
from .trees import Branch, RolloutTree


@dataclass(kw_only=True)
class Sample:
    """Tokens that were sampled and scored.

    Attributes:
        tokens: sampled tokens, those of the prompt and of a kept head left out; (n,) int32.
        sampling_logps: the sampler's log-probs of `tokens`, (n,) float32, or `None` where the backend gives none.
        policy: number of training batches the sampling policy had been trained on.
        rewards: (F,) float32 of the whole completion by each reward function, NaN where one gave none.
        reward: their weighted sum.
        extra: what reward functions told of it for the completions table, by column.
    """

    tokens: np.ndarray
    sampling_logps: np.ndarray | None
    policy: int
    rewards: np.ndarray
    reward: float
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def completion_length(self) -> int:
        """Tokens of the whole completion."""
        return len(self.tokens)


@dataclass(kw_only=True)
class Continuation(Sample):
    """A sample from the head of a rollout.

    Attributes:
        offset: tokens of the rollout that are kept before it.
    """

    offset: int

    @property
    def completion_length(self) -> int:
        return self.offset + len(self.tokens)


@dataclass(kw_only=True)
class Rollout(Sample):
    """An initial rollout, from the first completion token on."""

    @classmethod
    def at_next_stage(cls, earlier: "Rollout", **learnt) -> Self:
        """An earlier stage with what was learnt since."""
        return cls(**vars(earlier), **learnt)


@dataclass(kw_only=True)
class ReadRollout(Rollout):
    """A rollout and what one no-grad forward over it told.

    Attributes:
        old_logps: the trainer's log-probs under the sampling policy, (n,) float32.
        step_ranges: half-open token ranges of its steps, counted from the first completion token.
        influence: forward context influence y of each step (attnrl eq. 6), (num_steps,) float32, `None` where neither
            branching nor filter asks for it.
        entropies: entropy of each token's distribution, (n,) float32; only for entropy branching.
        thinking_length: tokens up to the end of its thinking.
    """

    old_logps: np.ndarray
    step_ranges: list[tuple[int, int]]
    influence: np.ndarray | None = None
    entropies: np.ndarray | None = None
    thinking_length: int = 0


@dataclass(kw_only=True)
class BranchedRollout(ReadRollout):
    """A rollout that was expanded.

    Attributes:
        branch_points: where it was branched.
        branches: its continuations; none where it has no place to branch.
    """

    branch_points: BranchPoints
    branches: list[Continuation]


@dataclass
class PromptRollouts:
    """A drawn prompt with its rollouts.

    Attributes:
        draw: where it came from.
        example: its row of the data set.
        prompt_ids: its tokens.
        rollouts: its initial rollouts, each at the stage it has reached.
        filtered: whether it was left out before branching because it is easy.
    """

    draw: Draw
    example: dict[str, Any]
    prompt_ids: list[int]
    rollouts: list[ReadRollout]
    filtered: bool = False

    def correct(self, threshold: float) -> list[bool]:
        """Which initial rollouts are correct."""
        return [rollout.reward >= threshold for rollout in self.rollouts]

    @property
    def num_mixed_trees(self) -> int:
        """How many of its trees have leaves of different rewards: those in which branching tells steps apart."""
        return sum(len({r.reward, *(branch.reward for branch in branches_of(r))}) > 1 for r in self.rollouts)

    @property
    def num_later_points(self) -> int:
        """How many of its branch points are not at the first steps: those that a criterion had to choose."""
        count = 0
        for rollout in self.rollouts:
            points = {branch.offset for branch in branches_of(rollout)}
            count += len(points.difference(start for start, _ in rollout.step_ranges[1 : 1 + len(points)]))
        return count

    def mean_influence(self) -> float:
        """ȳ: mean over the rollouts of the mean influence of their steps (eq. 8)."""
        means = [float(r.influence.mean()) for r in self.rollouts if r.influence is not None and r.influence.size]
        return sum(means) / len(means) if means else 0.0

    @property
    def continuations(self) -> list[Continuation]:
        """Continuations of all its rollouts."""
        return [branch for rollout in self.rollouts for branch in branches_of(rollout)]

    @property
    def leaves(self) -> list[Sample]:
        """All leaves: each rollout, then its continuations."""
        return [sample for rollout in self.rollouts for sample in (rollout, *branches_of(rollout))]

    def trees(self, values: Sequence[float] | None = None) -> list[RolloutTree]:
        """Its rollouts as trees.

        Args:
            values: reward of each leaf in the order of `leaves`; by default its own.
        """
        of_leaf = iter([sample.reward for sample in self.leaves] if values is None else values)
        return [
            RolloutTree(
                tokens=rollout.tokens.tolist(),
                reward=next(of_leaf),
                branches=[Branch(c.offset, c.tokens.tolist(), next(of_leaf)) for c in branches_of(rollout)],
            )
            for rollout in self.rollouts
        ]


def branches_of(rollout: Rollout) -> list[Continuation]:
    """Continuations of a rollout, none where it was not expanded."""
    return rollout.branches if isinstance(rollout, BranchedRollout) else []


def to_tokens(values: Sequence[int]) -> np.ndarray:
    """Int32 array of token ids."""
    return np.asarray(values, dtype=np.int32)


def to_array(values: Sequence[float] | None) -> np.ndarray | None:
    """Float32 array of log-probs, `None` kept."""
    return None if values is None else np.asarray(values, dtype=np.float32)
