"""Values and advantages of rollout trees."""

import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnrl.trees import Branch, RolloutTree, has_signal, root_value, tree_paths, tree_segments


def make_tree(length: int, reward: float, branches: list[tuple[int, int, float]], first: int = 0) -> RolloutTree:
    """A tree of distinct tokens from `first` on; branches are (offset, length, reward)."""
    tokens = list(range(first, first + length))
    return RolloutTree(
        tokens, reward, [Branch(b, [1000 * (i + 1) + t for t in range(n)], r) for i, (b, n, r) in enumerate(branches)]
    )


def rewards_of(trees) -> list[float]:
    return [r for tree in trees for r in [tree.reward, *(b.reward for b in tree.branches)]]


def test_two_rollouts_one_of_them_split_twice():
    trees = [make_tree(10, 1, [(3, 4, 0), (3, 2, 1), (6, 5, 1), (6, 1, 0)]), make_tree(7, 0, [])]
    segments = tree_segments(trees)
    assert root_value(trees) == 0.5
    assert [(s.leaf, s.start, s.end, s.parent, s.num_leaves) for s in segments[0]] == [
        (0, 0, 3, -1, 5),
        (0, 3, 6, 0, 3),
        (0, 6, 10, 1, 1),
        (1, 3, 7, 0, 1),
        (2, 3, 5, 0, 1),
        (3, 6, 11, 1, 1),
        (4, 6, 7, 1, 1),
    ]
    assert [s.value for s in segments[0]] == pytest.approx([0.6, 2 / 3, 1, 0, 1, 1, 0])
    first, second = 0.2 / math.sqrt(5), (1 / 6 + 1 / 15) / math.sqrt(3)
    expected = [first, second, 5 / 6, -1.1, 0.9, 5 / 6, -7 / 6]
    assert expected[:2] == pytest.approx([0.08944, 0.13472], abs=5e-6)
    assert [s.advantage for s in segments[0]] == pytest.approx(expected)
    assert [(s.start, s.end, s.num_leaves, s.advantage) for s in segments[1]] == [(0, 7, 1, -1.0)]

    paths = tree_paths(trees)
    assert [(p.tree, p.leaf, len(p.tokens)) for p in paths] == [
        (0, 0, 10),
        (0, 1, 7),
        (0, 2, 5),
        (0, 3, 11),
        (0, 4, 7),
        (1, 0, 7),
    ]
    assert paths[0].advantages == pytest.approx([first] * 3 + [second] * 3 + [5 / 6] * 4)
    assert paths[1].advantages == pytest.approx([first] * 3 + [-1.1] * 4)
    assert paths[4].advantages == pytest.approx([first] * 3 + [second] * 3 + [-7 / 6])
    assert paths[4].tokens == [0, 1, 2, 3, 4, 5, 4000]


def test_reference_advantages(shared_dir):
    questions = json.loads((shared_dir / "golden" / "attnrl_tree_advantages.json").read_text())["questions"]
    num_segments = 0
    for question in questions:
        trees = [
            make_tree(t["length"], t["reward"], [(c["split"], c["length"], c["reward"]) for c in t["children"]])
            for t in question["trees"]
        ]
        segments = tree_segments(trees)
        paths = {(p.tree, p.leaf): p for p in tree_paths(trees)}
        assert len(paths) == len(question["paths"])
        for reference in question["paths"]:
            path = paths[reference["tree"], reference["node"]]
            expected = [part["advantage"] for part in reference["segments"] for _ in range(part["length"])]
            assert path.advantages == pytest.approx(expected, abs=1e-9)
            chain = [next(s for s in reversed(segments[path.tree]) if s.leaf == path.leaf)]
            while chain[0].parent != -1:
                chain.insert(0, segments[path.tree][chain[0].parent])
            values = [part["value"] for part in reference["segments"]]
            assert [s.value for s in chain] == pytest.approx(values, abs=1e-9)
            assert [s.end - s.start for s in chain] == [part["length"] for part in reference["segments"]]
            num_segments += len(chain)
    assert len(questions) == 26
    assert num_segments > 500


def test_equal_offsets_are_one_split():
    together = tree_segments([make_tree(8, 1, [(4, 2, 0), (4, 2, 0), (4, 2, 1), (4, 2, 0)])])[0]
    assert [(s.start, s.end, s.parent, s.num_leaves) for s in together] == [
        (0, 4, -1, 5),
        (4, 8, 0, 1),
        *[(4, 6, 0, 1)] * 4,
    ]
    assert [s.advantage for s in together] == pytest.approx([0, 1.2, -0.8, -0.8, 1.2, -0.8])


def test_an_empty_continuation_is_a_leaf_that_ends_at_its_offset():
    paths = tree_paths([make_tree(4, 1, [(2, 0, 0)])])
    assert paths[1].tokens == [0, 1]
    assert paths[1].advantages == [0.0, 0.0]
    assert paths[0].advantages == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("offset", [-1, 0, 6, 7])
def test_an_offset_that_keeps_or_replaces_nothing_is_refused(offset):
    with pytest.raises(ValueError, match=f"offset={offset} .*6 tokens.*from 1 to 5"):
        tree_paths([make_tree(6, 1, [(offset, 2, 0)])])


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward):
    for tree in (make_tree(6, reward, []), make_tree(6, 1, [(2, 2, reward)])):
        with pytest.raises(ValueError, match=f"reward={reward}"):
            tree_paths([make_tree(3, 1, []), tree])


def test_a_prompt_without_trees_is_refused():
    with pytest.raises(ValueError, match="trees is empty"):
        tree_paths([])


@pytest.mark.parametrize(
    ("expanded", "unexpanded", "of_expanded", "of_all"),
    [
        ([1, 1, 1], [1], False, False),
        ([0, 0, 0], [0], False, False),
        ([0.5, 0.5, 0.5], [0.5], False, False),
        ([1, 1, 0], [1], True, True),
        ([1, 1, 1], [0], False, True),  # the leaves that differ are not trained on
        ([], [0, 1], False, True),
    ],
)
def test_signal_of_a_prompt(expanded, unexpanded, of_expanded, of_all):
    trees = [make_tree(3, reward, []) for reward in unexpanded]
    if expanded:
        trees.append(make_tree(9, expanded[0], [(2, 2, reward) for reward in expanded[1:]]))
    assert has_signal(trees) is of_expanded
    assert has_signal(trees, include_unexpanded=True) is of_all


# ---- random trees ---------------------------------------------------------------------------------------------------


RIGHT_OR_WRONG = st.sampled_from([0.0, 1.0])


@st.composite
def prompts(draw, rewards=RIGHT_OR_WRONG):
    trees = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 9))
        branch = st.tuples(st.integers(1, max(1, length - 1)), st.integers(0, 4), rewards)
        branches = draw(st.lists(branch, max_size=6)) if length > 1 else []
        trees.append(make_tree(length, draw(rewards), branches, first=10 * len(trees)))
    return trees


def reference_advantages(trees: list[RolloutTree]) -> dict[tuple[int, int], list[float]]:
    """Advantages token by token from the sets of leaves that share a token, in exact arithmetic."""
    root = Fraction(sum(map(Fraction, rewards_of(trees))), len(rewards_of(trees)))
    advantages = {}
    for index, tree in enumerate(trees):
        leaves = [(len(tree.tokens), Fraction(tree.reward))] + [(b.offset, Fraction(b.reward)) for b in tree.branches]

        def value(sharing: list[Fraction]) -> Fraction:
            return sum(sharing) / len(sharing)

        for leaf, (kept, reward) in enumerate(leaves):
            own = len(tree.branches[leaf - 1].tokens) if leaf else 0
            tokens = []
            for t in range(kept + own):
                in_rollout = t < kept
                start = max([0, *(b for b, _ in leaves[1:] if b <= t)]) if in_rollout else kept
                sharing = [r for b, r in leaves if b > t] if in_rollout else [reward]
                before = [r for b, r in leaves if b >= start] if start else None
                parent = value(before) if before else root
                tokens.append(float(2 * value(sharing) - root - parent) / math.sqrt(len(sharing)))
            advantages[index, leaf] = tokens
    return advantages


@settings(deadline=None, max_examples=200)
@given(trees=prompts(rewards=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-10, 10))))
def test_paths_of_random_trees(trees):
    expected = reference_advantages(trees)
    paths = tree_paths(trees)
    assert [(p.tree, p.leaf) for p in paths] == list(expected)
    for path in paths:
        tree = trees[path.tree]
        branch = tree.branches[path.leaf - 1] if path.leaf else Branch(len(tree.tokens), [], tree.reward)
        assert path.tokens == tree.tokens[: branch.offset] + branch.tokens
        assert path.advantages == pytest.approx(expected[path.tree, path.leaf], rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(trees=prompts(rewards=st.floats(-10, 10)))
def test_children_share_out_the_leaves_and_the_value_of_their_parent(trees):
    root = root_value(trees)
    segments = tree_segments(trees)
    leaves = [s for tree in segments for i, s in enumerate(tree) if all(other.parent != i for other in tree)]
    assert math.fsum(s.value - root for s in leaves) == pytest.approx(0, abs=1e-9)
    assert [s.num_leaves for s in leaves] == [1] * len(rewards_of(trees))
    for tree in segments:
        for index, segment in enumerate(tree):
            children = [s for s in tree if s.parent == index]
            if children:
                assert sum(s.num_leaves for s in children) == segment.num_leaves
                total = math.fsum(s.num_leaves * s.value for s in children)
                assert total == pytest.approx(segment.num_leaves * segment.value, abs=1e-9)
                assert all(s.start == segment.end for s in children)


@settings(deadline=None, max_examples=100)
@given(trees=prompts(), seed=st.integers(0, 999))
def test_order_of_trees_and_branches_does_not_matter(trees, seed):
    def by_tokens(some_trees):
        return sorted((p.tokens, p.advantages) for p in tree_paths(some_trees))

    rng = random.Random(seed)
    shuffled = [RolloutTree(t.tokens, t.reward, rng.sample(t.branches, len(t.branches))) for t in trees]
    rng.shuffle(shuffled)
    assert by_tokens(shuffled) == by_tokens(trees)


@settings(deadline=None, max_examples=100)
@given(trees=prompts(), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_advantages_follow_the_scale_of_rewards_and_ignore_their_level(trees, scale, shift):
    moved = [
        RolloutTree(
            t.tokens,
            scale * t.reward + shift,
            [Branch(b.offset, b.tokens, scale * b.reward + shift) for b in t.branches],
        )
        for t in trees
    ]
    for path, other in zip(tree_paths(trees), tree_paths(moved), strict=True):
        assert other.advantages == pytest.approx([scale * a for a in path.advantages], abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), reward=st.sampled_from([0.0, 1.0, -1.0, 0.3]))
def test_equal_rewards_give_no_advantage(data, reward):
    trees = data.draw(prompts(rewards=st.just(reward)))
    for path in tree_paths(trees):
        assert path.advantages == pytest.approx([0.0] * len(path.tokens), abs=1e-15)
    assert not has_signal(trees, include_unexpanded=True)
