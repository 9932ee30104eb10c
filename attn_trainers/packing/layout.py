"""Rows that share prefixes, folded into one row in which every shared token stands once.

The rows form a prefix trie. A token is shared when it and the token after it agree, so every node of the trie has one
next token, its label; where rows part, each branch repeats the last common token. In depth-first order the trie is the
packed row: position ids are depths, unary chains are contiguous segments, and the descendants of a segment lie right
behind it. With rows in lexicographic order the packed row is the first row, then of every further row what it does not
share with the row before it, so the trie is never built.

A traced example, rows A = 5 7 8 9, B = 5 7 8 2 and C = 5 7 6; in order they are C, B, A, where B shares one token with
C (5; at 7 they go on differently) and A shares two with B (5 7):

    position   0   1 2   3   4 5   6 7            5 ─┬─ 7 6
    token      5 | 7 6 | 7 | 8 2 | 8 9               └─ 7 ─┬─ 8 2
    depth      0 | 1 2 | 1 | 2 3 | 2 3                     └─ 8 9
    label      7 | 6 - | 8 | 2 - | 9 -
    segment    0 |  1  | 2 |  3  |  4             11 row tokens, 8 unique ones

The parents of the segments are -1, 0, 0, 2, 2; their subtrees end before the positions 8, 3, 8, 6, 8; row A is read at
the positions 0, 3, 6, 7. Everything is linear in the number of row tokens, but for the sorting of the rows.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


NO_LABEL = -100
"""Label of a position that predicts nothing that is trained."""


@dataclass(eq=False)
class PrefixTree:
    """The segments of a packed row: what attention has to know. Positions are packed, from 0.

    Attributes:
        starts: (S + 1,) first position of every segment; last entry the number of tokens.
        parents: (S,) segment before it on its path, -1 for a root.
        subtree_ends: (S,) position after its last descendant; its descendants are the positions from its end on.
        depths: (N,) position ids.
        readers: how many calls of an attention function have read the tree; a forward checks that all its layers did.
    """

    starts: list[int]
    parents: list[int]
    subtree_ends: list[int]
    depths: np.ndarray
    readers: int = 0
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def longest_path(self) -> int:
        """Tokens of the longest row."""
        return int(self.depths.max()) + 1

    @cached_property
    def longest_segment(self) -> int:
        return int(np.diff(self.starts).max())

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """Per segment, the positions from its root to its own end; entry d has depth d."""
        paths = []
        for segment, parent in enumerate(self.parents):
            own = np.arange(self.starts[segment], self.starts[segment + 1])
            paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
        return paths

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` returned when it was first asked for under `key`: layers share masks and index tensors."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows as one packed row, and where each row's completion tokens are scored.

    Attributes:
        tree: the segments.
        tokens: (N,) unique tokens in depth-first order.
        labels: (N,) next token of a position whose prediction is trained, `NO_LABEL` elsewhere.
        positions: per row (T,), packed position of each of its tokens.
        trained: (M,) positions whose prediction is trained, ascending.
        reads: (sum of C,) indices into `trained` that predict the completion tokens, rows end to end.
        lengths: per row, number C of completion tokens.
    """

    tree: PrefixTree
    tokens: np.ndarray
    labels: np.ndarray
    positions: list[np.ndarray]
    trained: np.ndarray
    reads: np.ndarray
    lengths: list[int]

    def split(self, values: Tensor) -> list[Tensor]:
        """Per row (C,), from values (M,) at the trained positions; differentiable."""
        reads = torch.from_numpy(self.reads).to(values.device)
        return list(values[reads].split(self.lengths))


def unique_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that are forwarded for these rows, a micro-batch's cost: `pack_rows(rows, ...).tree.num_tokens`."""
    distinct, _ = _in_order(rows)
    return sum(len(row) for row in distinct) - sum(_shared_lengths(distinct))


def pack_rows(rows: Sequence[Sequence[int]], completion_starts: Sequence[int]) -> PackedRows:
    """Fold rows that may share prefixes into one row.

    Args:
        rows: token ids of each row, prompt and completion, without padding; sequences or one-dimensional arrays.
        completion_starts: per row, index of its first completion token; from 1 to the row's length, which means none.

    Returns:
        The packed row; the module's docstring carries an example.

    Raises:
        ValueError: for no rows, an empty row, a start out of range, or unequal numbers of rows and starts.
    """
    if len(rows) != len(completion_starts) or not len(rows):
        raise ValueError(
            f"completion_starts has {len(completion_starts)} entries for {len(rows)} rows; pass one each, for one row "
            "at least."
        )
    for row, start in zip(rows, completion_starts, strict=True):
        if not 1 <= start <= len(row):
            raise ValueError(
                f"completion_starts={start} is out of range for a row of {len(row)} tokens; set it between 1 (a first "
                "token is predicted by none) and the row's length."
            )
    distinct, places = _in_order(rows)
    tokens, labels, depths, index, cuts = _lay_out(distinct, _shared_lengths(distinct))
    positions = [index[place] for place in places]
    predictors = [
        where[start - 1 : -1] for where, start in zip(positions, completion_starts, strict=True)
    ]  # per row (C,), the position before each completion token
    trained, reads = np.unique(np.concatenate(predictors), return_inverse=True)
    is_trained = np.zeros(len(tokens), dtype=bool)
    is_trained[trained] = True
    return PackedRows(
        tree=_segments(np.array(sorted(cuts)), depths),
        tokens=tokens,
        labels=np.where(is_trained, labels, NO_LABEL),
        positions=positions,
        trained=trained,
        reads=reads,
        lengths=[len(where) for where in predictors],
    )


def _in_order(rows: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], list[int]]:
    """The distinct rows, any prefix before what extends it and rows that share side by side; per row its place there.

    Big-endian bytes sort as the tokens do, and comparing them is one call of memcmp.
    """
    names = [np.asarray(row, dtype=">i4").tobytes() for row in rows]
    order = {name: place for place, name in enumerate(sorted(set(names)))}
    distinct = [np.frombuffer(name, dtype=">i4").astype(np.int64) for name in order]
    return distinct, [order[name] for name in names]


def _shared_lengths(distinct: list[np.ndarray]) -> list[int]:
    """Per row, the tokens that it shares with the row before it: agreeing, and agreeing in the next token too."""
    lengths = [0]
    for before, row in zip(distinct[:-1], distinct[1:], strict=True):
        width = min(len(before), len(row))
        differs = before[:width] != row[:width]  # (width,)
        common = int(differs.argmax()) if differs.any() else width
        lengths.append(max(common - 1, 0))
    return lengths


def _lay_out(distinct: list[np.ndarray], shared: list[int]):
    """Tokens, labels and depths (N,) of the packed row, positions of rows' tokens, first positions of segments."""
    tokens, labels, depths, index, cuts = [], [], [], [], {0}
    offset = 0
    for row, length in zip(distinct, shared, strict=True):
        own = np.arange(offset, offset + len(row) - length)
        if length:
            cuts.add(int(index[-1][length - 1]) + 1)  # the segment of the last common token ends where rows part
            own = np.concatenate([index[-1][:length], own])
        cuts.add(offset)
        index.append(own)
        tokens.append(row[length:])
        labels.append(np.append(row[length + 1 :], NO_LABEL))
        depths.append(np.arange(length, len(row)))
        offset += len(row) - length
    return np.concatenate(tokens), np.concatenate(labels), np.concatenate(depths), index, cuts


def _segments(starts: np.ndarray, depths: np.ndarray) -> PrefixTree:
    """Parents and ends of subtrees, from the depth at which each segment starts: deeper ones that follow are below."""
    edges = [*starts.tolist(), len(depths)]
    first_depths = depths[starts].tolist()
    parents, subtree_ends, path = [], [len(depths)] * len(starts), []
    for segment, depth in enumerate(first_depths):
        while path and first_depths[path[-1]] >= depth:
            subtree_ends[path.pop()] = edges[segment]
        parents.append(path[-1] if path else -1)
        path.append(segment)
    return PrefixTree(edges, parents, subtree_ends, depths)
