"""Rollout trees of one prompt: values and advantages of their segments (AttnRL, arXiv 2509.26628, eq. 2 and 3).

A virtual root holds one chain per initial rollout. A rollout with branch offsets b1 < b2 is cut there into segments,
and each continuation hangs beside the segment that follows its offset:

    root ─ rollout[0:b1] ─┬─ rollout[b1:b2] ─┬─ rollout[b2:]       leaf 0
                          │                  └─ continuation at b2  leaf
                          └─ continuation at b1                     leaf
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Branch:
    """One continuation, sampled from the tree's rollout cut at `offset`.

    Attributes:
        offset: tokens of the rollout that are kept before the continuation, from 1 to the rollout's length - 1.
        tokens: the continuation alone.
        reward: reward of the whole completion.
    """

    offset: int
    tokens: list[int]
    reward: float


@dataclass
class RolloutTree:
    """An initial rollout with the continuations branched from it.

    Attributes:
        tokens: the initial rollout.
        reward: its reward.
        branches: continuations, in any order; equal offsets share one split.
    """

    tokens: list[int]
    reward: float
    branches: list[Branch]


@dataclass
class TreePath:
    """One leaf, from the first token of the rollout on.

    Attributes:
        tree: index of its tree among the prompt's trees.
        leaf: 0 for the initial rollout, i for the i-th branch (from 1, in the order given).
        tokens: a whole completion.
        advantages: one per token.
    """

    tree: int
    leaf: int
    tokens: list[int]
    advantages: list[float]


@dataclass(frozen=True)
class Segment:
    """A node of a tree.

    Attributes:
        tree: index of its tree.
        leaf: the leaf whose tokens it is cut from: 0 for a part of the rollout, i for the i-th continuation.
        start, end: half-open range in the tokens of that leaf's completion, prefix included.
        parent: index of its parent among the tree's segments, -1 for the virtual root.
        num_leaves: |L(s)|, leaves under it.
        value: V(s), mean reward of those leaves (eq. 2).
        advantage: A(s) (eq. 3).
    """

    tree: int
    leaf: int
    start: int
    end: int
    parent: int
    num_leaves: int
    value: float
    advantage: float


def root_value(trees: Sequence[RolloutTree]) -> float:
    """V(root): mean reward over all leaves of the prompt, unexpanded rollouts included.

    Raises:
        ValueError: for a prompt without trees or a reward that is not finite.
    """
    rewards = [reward for tree in trees for reward in _leaf_rewards(tree)]
    if not rewards:
        raise ValueError("trees is empty; a prompt needs at least one rollout.")
    for reward in rewards:
        if not math.isfinite(reward):
            raise ValueError(f"reward={reward} of a leaf is not finite; score every rollout and continuation first.")
    return math.fsum(rewards) / len(rewards)


def tree_segments(trees: Sequence[RolloutTree]) -> list[list[Segment]]:
    """Segments of each tree: first the parts of the rollout in order, then one per continuation in the order given.

    V(s) is the mean reward of the leaves under s;
    A(s) = ((V(s) - V(root)) + (V(s) - V(parent(s)))) / sqrt(|L(s)|).

    Args:
        trees: all trees of one prompt.

    Returns:
        Per tree its segments.

    Raises:
        ValueError: for an offset outside its rollout, a reward that is not finite, or no tree.
    """
    root = root_value(trees)
    return [_segments(index, tree, root) for index, tree in enumerate(trees)]


def tree_paths(trees: Sequence[RolloutTree]) -> list[TreePath]:
    """All leaves of one prompt's trees with the advantage of each token, unexpanded rollouts included.

    Args:
        trees: all trees of one prompt.

    Returns:
        Leaves in order of tree and leaf; a token of segment s carries A(s) (attnrl eq. 3).

    Raises:
        ValueError: as `tree_segments`.
    """
    paths = []
    for index, (tree, segments) in enumerate(zip(trees, tree_segments(trees), strict=True)):
        completions = [tree.tokens] + [tree.tokens[: b.offset] + b.tokens for b in tree.branches]
        leaf_segments = {segment.leaf: i for i, segment in enumerate(segments)}  # the last segment of each leaf
        for leaf, tokens in enumerate(completions):
            advantages: list[float] = []
            for segment in _ancestry(segments, leaf_segments[leaf]):
                advantages += [segment.advantage] * (segment.end - segment.start)
            paths.append(TreePath(index, leaf, tokens, advantages))
    return paths


def has_signal(trees: Sequence[RolloutTree], include_unexpanded: bool = False) -> bool:
    """Whether the leaves that are trained on differ in reward (the zero-advantage filter, on the level of the prompt).

    Args:
        trees: all trees of one prompt.
        include_unexpanded: whether rollouts without branches are trained on.
    """
    rewards = {r for tree in trees if tree.branches or include_unexpanded for r in _leaf_rewards(tree)}
    return len(rewards) > 1


def _leaf_rewards(tree: RolloutTree) -> list[float]:
    return [tree.reward] + [branch.reward for branch in tree.branches]


def _ancestry(segments: Sequence[Segment], index: int) -> list[Segment]:
    """Segments from the root's child down to the given one."""
    path = []
    while index != -1:
        path.append(segments[index])
        index = segments[index].parent
    return path[::-1]


def _segments(index: int, tree: RolloutTree, root: float) -> list[Segment]:
    length = len(tree.tokens)
    for branch in tree.branches:
        if not 0 < branch.offset < length:
            raise ValueError(
                f"offset={branch.offset} of a branch is outside its rollout of {length} tokens; it must lie from 1 to "
                f"{length - 1}, so that tokens are kept before it and replaced after it."
            )
    cuts = [0, *sorted({branch.offset for branch in tree.branches}), length]
    segments: list[Segment] = []
    parent_value = root
    for part, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        rewards = [tree.reward] + [b.reward for b in tree.branches if b.offset > start]
        segment = _segment(index, 0, start, end, part - 1, rewards, root, parent_value)
        segments.append(segment)
        parent_value = segment.value
    part_before = {cut: part for part, cut in enumerate(cuts[1:])}  # the part of the rollout that ends at a cut
    for leaf, branch in enumerate(tree.branches, start=1):
        parent = part_before[branch.offset]
        end = branch.offset + len(branch.tokens)
        segments.append(
            _segment(index, leaf, branch.offset, end, parent, [branch.reward], root, segments[parent].value)
        )
    return segments


def _segment(
    tree: int, leaf: int, start: int, end: int, parent: int, rewards: list[float], root: float, parent_value: float
) -> Segment:
    value = math.fsum(rewards) / len(rewards)
    advantage = ((value - root) + (value - parent_value)) / math.sqrt(len(rewards))
    return Segment(tree, leaf, start, end, parent, len(rewards), value, advantage)
