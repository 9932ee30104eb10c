"""What is known of a prompt on its way through the pipeline: its rollouts, their branches, and the stream it came
from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .exploration import BranchPoints
from .trees import Branch, RolloutTree


@dataclass(frozen=True)
class Draw:
    """One prompt drawn from the data: the number of the draw since the start of training, and the data set index."""

    serial: int
    index: int


class PromptStream:
    """An endless, shuffled sequence of data set indices whose whole state is a count.

    Draw s is entry s mod size of the permutation of epoch s div size, so that a resumed run, and a run on any number
    of ranks, draws the same prompts.

    Args:
        size: number of prompts in the data set.
        seed: seed of the permutations.
        shuffle: `False` keeps the data set's order in each epoch.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError(
                f"train_dataset has {size} prompts; at least 1 is needed. Check the data and its filters."
            )
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.next_serial = 0
        self._epoch, self._order = -1, range(size)

    def draw(self, count: int) -> list[Draw]:
        """The next `count` prompts."""
        first, self.next_serial = self.next_serial, self.next_serial + count
        return self.draws(first, count)

    def draws(self, first: int, count: int) -> list[Draw]:
        """The draws `first` to `first + count - 1`, whether made already or not."""
        return [Draw(serial, self._index(serial)) for serial in range(first, first + count)]

    def _index(self, serial: int) -> int:
        epoch, position = divmod(serial, self.size)
        if epoch != self._epoch:
            order = list(range(self.size))
            if self.shuffle:
                random.Random(f"{self.seed}/prompts/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[position]


@dataclass
class Continuation:
    """A sample from the head of a rollout.

    Attributes:
        offset: tokens of the rollout that are kept before it.
        tokens: the continuation alone.
        sampling_logps: the sampler's log-probs of `tokens`, (n,) float32, or `None` where the backend gives none.
        policy: number of training batches the sampling policy had been trained on.
        reward: weighted reward of the whole completion; NaN until scored.
    """

    offset: int
    tokens: list[int]
    sampling_logps: np.ndarray | None
    policy: int
    reward: float = float("nan")


@dataclass
class Rollout:
    """An initial rollout and what one no-grad forward over it told.

    Attributes:
        tokens, sampling_logps, policy, reward: as in `Continuation`.
        old_logps: the trainer's log-probs under the sampling policy, (n,) float32.
        step_ranges: half-open token ranges of its steps, counted from the first completion token.
        influence: forward context influence y of each step (attnrl eq. 6), (num_steps,) float32.
        entropies: entropy of each token's distribution, (n,) float32; only kept for entropy branching.
        branch_points: where it is branched, once chosen.
        branches: its continuations.
    """

    tokens: list[int]
    sampling_logps: np.ndarray | None
    policy: int
    reward: float = float("nan")
    old_logps: np.ndarray | None = None
    step_ranges: list[tuple[int, int]] = field(default_factory=list)
    influence: np.ndarray | None = None
    entropies: np.ndarray | None = None
    branch_points: BranchPoints | None = None
    branches: list[Continuation] = field(default_factory=list)


@dataclass
class PromptRollouts:
    """A drawn prompt with its rollouts.

    Attributes:
        draw: where it came from.
        example: its row of the data set.
        prompt_ids: its tokens.
        rollouts: its initial rollouts.
        filtered: whether it was left out before branching because it is easy.
    """

    draw: Draw
    example: dict[str, Any]
    prompt_ids: list[int]
    rollouts: list[Rollout]
    filtered: bool = False

    def correct(self, threshold: float) -> list[bool]:
        """Which initial rollouts are correct."""
        return [rollout.reward >= threshold for rollout in self.rollouts]

    def mean_influence(self) -> float:
        """ȳ: mean over the rollouts of the mean influence of their steps (eq. 8)."""
        means = [float(r.influence.mean()) for r in self.rollouts if r.influence is not None and r.influence.size]
        return sum(means) / len(means) if means else 0.0

    def trees(self) -> list[RolloutTree]:
        """Its rollouts as trees of leaves with rewards."""
        return [
            RolloutTree(
                tokens=rollout.tokens,
                reward=rollout.reward,
                branches=[Branch(c.offset, c.tokens, c.reward) for c in rollout.branches],
            )
            for rollout in self.rollouts
        ]


def to_array(values: Sequence[float] | None) -> np.ndarray | None:
    """Float32 array of log-probs, `None` kept."""
    return None if values is None else np.asarray(values, dtype=np.float32)
