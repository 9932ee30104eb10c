"""The packed row of rows: the documented example, and what holds for any."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.packing import pack_rows, unique_tokens
from attn_trainers.packing.layout import NO_LABEL


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def test_documented_example():
    packed = pack_rows([[5, 7, 8, 9], [5, 7, 8, 2], [5, 7, 6]], [1, 2, 3])
    assert packed.tokens.tolist() == [5, 7, 6, 7, 8, 2, 8, 9]
    assert packed.tree.depths.tolist() == [0, 1, 2, 1, 2, 3, 2, 3]
    assert packed.tree.starts == [0, 1, 3, 4, 6, 8]
    assert packed.tree.parents == [-1, 0, 0, 2, 2]
    assert packed.tree.subtree_ends == [8, 3, 8, 6, 8]
    assert [where.tolist() for where in packed.positions] == [[0, 3, 6, 7], [0, 3, 4, 5], [0, 1, 2]]
    # Trained: all of the first row but its first token, two tokens of the second, none of the third.
    assert packed.labels.tolist() == [7, NO_LABEL, NO_LABEL, 8, 2, NO_LABEL, 9, NO_LABEL]
    assert packed.trained.tolist() == [0, 3, 4, 6]
    assert packed.lengths == [3, 2, 0]
    assert packed.tree.longest_path == 4
    assert packed.tree.longest_segment == 2


@settings(deadline=None)
@given(ROWS)
def test_rows_are_read_back(rows):
    packed = pack_rows(rows, [1] * len(rows))
    for row, where in zip(rows, packed.positions, strict=True):
        assert packed.tokens[where].tolist() == row
        assert packed.tree.depths[where].tolist() == list(range(len(row)))
    labels = torch.from_numpy(packed.labels[packed.trained])
    assert [one.tolist() for one in packed.split(labels)] == [row[1:] for row in rows]


@settings(deadline=None)
@given(ROWS)
def test_a_token_stands_once_per_prefix_and_next_token(rows):
    nodes = {(tuple(row[: i + 1]), row[i + 1] if i + 1 < len(row) else None) for row in rows for i in range(len(row))}
    packed = pack_rows(rows, [1] * len(rows))
    assert packed.tree.num_tokens == len(packed.tokens) == len(nodes) == unique_tokens(rows)


@settings(deadline=None)
@given(ROWS)
def test_paths_and_subtrees_say_the_same_as_the_rows(rows):
    tree = (packed := pack_rows(rows, [1] * len(rows))).tree
    sees = np.zeros((tree.num_tokens, tree.num_tokens), dtype=bool)  # [query, key], from the rows themselves
    for where in packed.positions:
        for depth, query in enumerate(where):
            sees[query, where[: depth + 1]] = True
    by_path, by_subtree = np.zeros_like(sees), np.zeros_like(sees)
    for segment, (start, end) in enumerate(zip(tree.starts[:-1], tree.starts[1:], strict=True)):
        path = tree.paths[segment]
        assert tree.depths[path].tolist() == list(range(len(path)))
        for query in range(start, end):
            by_path[query, path[: len(path) - (end - 1 - query)]] = True
            by_subtree[query : tree.subtree_ends[segment], query] = True
    assert (by_path == sees).all()
    assert (by_subtree == sees).all()


def test_one_row_is_itself():
    packed = pack_rows([[3, 1, 4, 1, 5]], [2])
    assert packed.tokens.tolist() == [3, 1, 4, 1, 5]
    assert packed.tree.starts == [0, 5]
    assert packed.trained.tolist() == [1, 2, 3]


def test_published_tree():
    """Five rows of length L, branched twice at 0.4 L and at 0.6 L, are 3 L tokens and one for each branch."""
    length, random = 1000, np.random.default_rng(0)
    rollout = random.integers(0, 50, length)
    rows = [rollout]
    for cut in (400, 400, 600, 600):
        tail = (rollout[cut:] + random.integers(1, 50, length - cut)) % 50  # unlike the rollout from its first token
        rows.append(np.concatenate([rollout[:cut], tail]))
    rows[2][400], rows[4][600] = (rows[1][400] + 1) % 50, (rows[3][600] + 1) % 50  # and unlike each other
    assert rows[0][400] not in (rows[1][400], rows[2][400])
    assert rows[0][600] not in (rows[3][600], rows[4][600])
    assert unique_tokens(rows) == 3 * length + 4


@pytest.mark.parametrize(
    ("rows", "starts", "match"),
    [
        ([], [], "0 rows"),
        ([[1, 2]], [1, 1], "2 entries for 1 rows"),
        ([[1, 2]], [0], "completion_starts=0"),
        ([[1, 2]], [3], "completion_starts=3"),
        ([[]], [1], "row of 0 tokens"),
    ],
)
def test_refuses(rows, starts, match):
    with pytest.raises(ValueError, match=match):
        pack_rows(rows, starts)
