"""How training rows are spread over updates, micro-batches and ranks.

All functions are pure: given the rows in one order, every rank computes the same arrangement and takes its own part.
A tree's rows stay together where they can, since they share prefixes: the cost of rows that lie together is their
unique tokens (`unique_tokens`).
"""

import random
from collections.abc import Sequence

from .rows import TrainingRow


Rows = list[TrainingRow]
MicroBatch = list[Rows]
"""Rows of each rank."""
Update = list[MicroBatch]
"""Micro-batches of one optimizer update, each with rows on one rank at least."""

# How far the slowest rank may lie above the mean before trees are split to level the ranks.
_LEVEL = 1.05


def unique_tokens(rows: Sequence[TrainingRow]) -> int:
    """Tokens of some rows of one tree, shared ones counted once.

    A row is the tree's rollout up to `fresh_from` and then tokens of its own, so that heads are prefixes of each
    other: rows of a 2-token prompt and a 10-token rollout, branched at 6 into a continuation of 3 tokens, hold
    2 + 10 + 3 tokens together, 2 + 10 and 2 + 6 + 3 apart.
    """
    if not rows:
        return 0
    own = sum(len(row.completion_ids) - row.fresh_from for row in rows)
    return len(rows[0].prompt_ids) + max(row.fresh_from for row in rows) + own


def group_trees(rows: Sequence[TrainingRow]) -> list[Rows]:
    """Rows by their trees, in the order in which trees first appear."""
    trees: dict[str, Rows] = {}
    for row in rows:
        trees.setdefault(row.tree, []).append(row)
    return list(trees.values())


def split_tree(rows: Rows) -> list[Rows]:
    """Two parts of some rows of one tree that share least: the rows that leave first, and the others.

    Rows that leave at the same token are halved. A single row has one part, itself.
    """
    if len(rows) < 2:
        return [rows]
    first = min(row.fresh_from for row in rows)
    early = [row for row in rows if row.fresh_from == first]
    late = [row for row in rows if row.fresh_from > first]
    if late:
        return [late, early]
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]]


def split_to_budget(rows: Rows, budget: int) -> list[Rows]:
    """Parts of a tree that hold at most `budget` unique tokens each, or a single row."""
    if unique_tokens(rows) <= budget or len(rows) < 2:
        return [rows]
    return [part for half in split_tree(rows) for part in split_to_budget(half, budget)]


def split_updates(rows: Sequence[TrainingRow], rows_per_update: int) -> list[Rows]:
    """Whole trees on ⌈rows / rows per update⌉ updates of like many rows and tokens, whatever the ranks.

    The largest tree goes first, each to the update with the fewest rows yet, of those to the one with the fewest
    tokens: so updates differ by less than a tree's rows, and each sees trees of all sizes. 600 rows at 192 an update
    are 4 updates of 150.
    """
    count = -(-len(rows) // rows_per_update)
    updates: list[Rows] = [[] for _ in range(count)]
    tokens = [0] * count
    for tree in sorted(group_trees(rows), key=unique_tokens, reverse=True):
        least = min(range(count), key=lambda i: (len(updates[i]), tokens[i]))
        updates[least] += tree
        tokens[least] += unique_tokens(tree)
    return [update for update in updates if update]


def _deal(parts: Sequence[Rows], num_ranks: int) -> list[list[Rows]]:
    """Parts to ranks, the largest first, each to the rank with the fewest tokens yet."""
    shares: list[list[Rows]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for part in sorted(parts, key=unique_tokens, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(part)
        loads[least] += unique_tokens(part)
    return shares


def _load(parts: Sequence[Rows]) -> int:
    return sum(map(unique_tokens, parts))


def level_ranks(parts: Sequence[Rows], num_ranks: int) -> list[list[Rows]]:
    """Deal parts of trees to ranks so that the slowest carries little more than the mean.

    Whole parts are dealt, the largest first. While the slowest rank lies more than a twentieth above the mean, its
    largest part is split at its first branch point and all are dealt again: a shared prefix is then forwarded twice,
    which is worth it as long as the slowest rank gets faster. The best deal that was seen is taken.

    Three trees A, B, C of 10 tokens each on two ranks, each a rollout of 8 with a continuation of 2 tokens branched
    at 4 (no prompt): whole they are [A, C] [B] = 20 and 10 tokens. A is split into its rollout (8) and the
    continuation with its head (6); dealt again, B, C, A's 8 and A's 6 are [B, 8] [C, 6] = 18 and 16, 1.06 times the
    mean. Splitting B as well gives [C, 6, 6] [8, 8] = 22 and 16, which is worse: the deal before it is taken.

    Args:
        parts: rows of one tree each.
        num_ranks: ranks.

    Returns:
        Per rank its parts.
    """
    parts = list(parts)
    best = shares = _deal(parts, num_ranks)
    for _ in range(sum(map(len, parts))):
        loads = [_load(share) for share in shares]
        if max(loads) <= _LEVEL * sum(loads) / num_ranks:
            break
        slowest = shares[loads.index(max(loads))]
        largest = max(slowest, key=lambda part: (len(part) > 1, unique_tokens(part)))
        if len(largest) < 2:
            break
        parts = [part for part in parts if part is not largest] + split_tree(largest)
        shares = _deal(parts, num_ranks)
        if max(map(_load, shares)) < max(map(_load, best)):
            best = shares
    return best


def _fill(parts: Sequence[Rows], budget: int) -> list[Rows]:
    """Parts, the largest first, each into the first micro-batch where it fits the budget."""
    micro_batches: list[Rows] = []
    tokens: list[int] = []
    for part in sorted(parts, key=unique_tokens, reverse=True):
        size = unique_tokens(part)
        index = next((i for i, used in enumerate(tokens) if used + size <= budget), len(tokens))
        if index == len(tokens):
            micro_batches.append([])
            tokens.append(0)
        micro_batches[index] += part
        tokens[index] += size
    return micro_batches


def micro_batches_by_tokens(rows: Rows, num_ranks: int, budget: int) -> Update:
    """Micro-batches of whole trees, or of subtrees where one exceeds the budget, by unique tokens.

    A row that exceeds the budget alone has a micro-batch of its own.
    """
    parts = [part for tree in group_trees(rows) for part in split_to_budget(tree, budget)]
    shares = [_fill(share, budget) for share in level_ranks(parts, num_ranks)]
    return [[share[index] if index < len(share) else [] for share in shares] for index in range(max(map(len, shares)))]


def micro_batches_by_rows(rows: Rows, num_ranks: int, rows_per_rank: int) -> Update:
    """Micro-batches of at most `rows_per_rank` rows of like length on each rank, all as full as each other.

    Rows of one length share a micro-batch, so that little of it is padding. Of every other micro-batch the ranks take
    their rows in reverse, so that none has the longest each time.
    """
    count = -(-len(rows) // (num_ranks * rows_per_rank))
    quotient, remainder = divmod(len(rows), count)
    ordered = sorted(rows, key=lambda row: row.length, reverse=True)
    update: Update = []
    start = 0
    for index in range(count):
        group = ordered[start : start + quotient + (index < remainder)]
        start += len(group)
        micro_batch = [group[rank::num_ranks] for rank in range(num_ranks)]
        update.append(micro_batch[::-1] if index % 2 else micro_batch)
    return update


def arrange_updates(
    rows: Sequence[TrainingRow],
    *,
    rows_per_update: int,
    num_ranks: int,
    rows_per_rank: int,
    max_tokens: int | None,
    seed: str,
) -> list[Update]:
    """Spread the rows of a generation batch over updates, micro-batches and ranks.

    Args:
        rows: any number; no rows are no updates.
        rows_per_update: rows of one update over all ranks; whole trees may exceed it by less than one tree.
        num_ranks: ranks.
        rows_per_rank: rows of a micro-batch on one rank, where `max_tokens` is `None`.
        max_tokens: unique tokens of a micro-batch on one rank.
        seed: of the order of the updates, and of the micro-batches in each.

    Returns:
        Updates; the rows of each depend on `rows_per_update` only, not on how many ranks share them.
    """
    rng = random.Random(seed)
    updates = []
    for group in split_updates(rows, rows_per_update):
        if max_tokens is None:
            update = micro_batches_by_rows(group, num_ranks, rows_per_rank)
        else:
            update = micro_batches_by_tokens(group, num_ranks, max_tokens)
        rng.shuffle(update)
        updates.append(update)
    random.Random(f"{seed}/updates").shuffle(updates)
    return updates


def rank_loads(update: Update) -> list[int]:
    """Tokens that each rank forwards in an update: those of a tree's rows that lie in one micro-batch once."""
    return [
        sum(unique_tokens(tree) for micro_batch in update for tree in group_trees(micro_batch[rank]))
        for rank in range(len(update[0]))
    ]
