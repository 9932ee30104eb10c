import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnrl.batches import (
    arrange_updates,
    group_trees,
    level_ranks,
    micro_batches_by_rows,
    rank_loads,
    split_to_budget,
    split_tree,
    split_updates,
    unique_tokens,
)
from attn_trainers.attnrl.rows import TrainingRow


def row(length, fresh_from=None, tree="0/0", leaf=0, prompt=0):
    zeros = np.zeros(length, dtype=np.float32)
    tokens = np.zeros(length, dtype=np.int32)
    fresh_from = length if fresh_from is None else fresh_from
    return TrainingRow([0] * prompt, tokens, zeros, zeros, zeros, fresh_from, key=f"{tree}/{leaf}")


def tree_rows(name, length, cuts=(), tails=(), prompt=0):
    """A rollout, and a continuation of `tails[i]` tokens at `cuts[i]`."""
    branches = [row(c + t, c, name, i, prompt) for i, (c, t) in enumerate(zip(cuts, tails, strict=True), start=1)]
    return [row(length, tree=name, prompt=prompt), *branches]


def random_batch(rng, num_prompts, mean_length=2000, longest=8192):
    """Rows of the published tree with lengths as a reasoning model's: most middling, some cut off."""
    rows = []
    for prompt in range(num_prompts):
        prompt_length = rng.randint(50, 300)
        for index in range(rng.choice([3, 3, 4, 5, 6])):
            length = min(longest, int(rng.lognormvariate(np.log(mean_length), 0.6)) + 2)
            cuts = sorted(rng.choices(range(1, length), k=2))
            offsets = [cuts[0], cuts[0], cuts[1], cuts[1]]
            tails = [min(longest - o, int(rng.lognormvariate(np.log(mean_length), 0.6)) + 1) for o in offsets]
            rows += tree_rows(f"{prompt}/{index}", length, offsets, tails, prompt_length)
    return rows


def keys(rows):
    return sorted(r.key for r in rows)


def test_shared_tokens_count_once():
    rows = tree_rows("0/0", 10, (6, 3), (3, 5), prompt=2)
    assert unique_tokens(rows) == 2 + 10 + 3 + 5
    assert unique_tokens(rows[1:]) == 2 + 6 + 3 + 5
    assert [unique_tokens([r]) for r in rows] == [12, 11, 10]
    assert unique_tokens([]) == 0


def test_a_tree_is_split_where_its_first_rows_leave():
    rows = tree_rows("0/0", 10, (3, 6, 3, 6), (1, 1, 1, 1))
    late, early = split_tree(rows)
    assert [r.fresh_from for r in early] == [3, 3]
    assert [r.fresh_from for r in late] == [10, 6, 6]
    assert [[r.fresh_from for r in part] for part in split_tree(early)] == [[3], [3]]
    assert split_tree(rows[:1]) == [rows[:1]]


def test_a_tree_above_the_budget_becomes_subtrees_within_it():
    rows = tree_rows("0/0", 10, (3, 6, 3, 6), (4, 4, 4, 4))  # 26 tokens
    assert split_to_budget(rows, 26) == [rows]
    parts = split_to_budget(rows, 18)
    assert [unique_tokens(part) for part in parts] == [18, 11]
    assert keys(r for part in parts for r in part) == keys(rows)
    assert [len(part) for part in split_to_budget(rows, 5)] == [1] * 5  # single rows, although above the budget


def test_the_traced_example_of_the_docstring():
    trees = [tree_rows(f"0/{name}", 8, (4,), (2,)) for name in range(3)]
    shares = level_ranks(trees, 2)
    assert sorted(sum(map(unique_tokens, share)) for share in shares) == [16, 18]


@pytest.mark.parametrize(
    ("num_trees", "rows_per_update", "expected"),
    [(120, 192, [150] * 4), (1, 192, [5]), (0, 192, []), (384, 192, [190] * 6 + [195] * 4), (3, 4, [5, 5, 5])],
)
def test_a_batch_is_as_many_updates_as_it_has_rows_for(num_trees, rows_per_update, expected):
    rows = [r for i in range(num_trees) for r in tree_rows(f"{i}/0", 9, (2, 2, 5, 5), (3, 3, 3, 3))]
    assert sorted(map(len, split_updates(rows, rows_per_update))) == expected


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    num_prompts=st.integers(0, 6),
    rows_per_update=st.integers(1, 60),
    max_tokens=st.sampled_from([None, 500, 20_000]),
)
def test_every_row_is_arranged_once_and_its_update_does_not_depend_on_the_ranks(
    seed, num_prompts, rows_per_update, max_tokens
):
    rows = random_batch(random.Random(seed), num_prompts, mean_length=60)
    composition = []
    for num_ranks, rows_per_rank in ((1, 4), (2, 2), (4, 1)):
        updates = arrange_updates(
            rows,
            rows_per_update=rows_per_update,
            num_ranks=num_ranks,
            rows_per_rank=rows_per_rank,
            max_tokens=max_tokens,
            seed="s",
        )
        composition.append([keys(r for part in update for rank in part for r in rank) for update in updates])
        for update in updates:
            for micro_batch in update:
                assert len(micro_batch) == num_ranks and any(micro_batch)
                if max_tokens is None:
                    assert max(map(len, micro_batch)) <= rows_per_rank
                    continue
                for part in micro_batch:
                    tokens = sum(map(unique_tokens, group_trees(part)))
                    assert tokens <= max_tokens or len(part) == 1
    assert sorted(sum(composition[0], [])) == keys(rows)
    assert composition[0] == composition[1] == composition[2]


@pytest.mark.parametrize("max_tokens", [None, 16_384, 65_536])
@pytest.mark.parametrize("seed", range(5))
def test_the_slowest_rank_carries_at_most_a_tenth_more_than_the_mean(seed, max_tokens):
    rows = random_batch(random.Random(seed), 50)
    updates = arrange_updates(
        rows, rows_per_update=192, num_ranks=8, rows_per_rank=4, max_tokens=max_tokens, seed=str(seed)
    )
    assert len(updates) == -(-len(rows) // 192)
    loads = [rank_loads(update) for update in updates]
    if max_tokens is None:  # rows are forwarded whole
        loads = [[sum(r.length for part in update for r in part[rank]) for rank in range(8)] for update in updates]
    for of_update in loads:
        assert max(of_update) <= 1.1 * sum(of_update) / 8


def test_trees_of_one_length_are_split_where_whole_ones_do_not_come_out_even():
    rows = [r for i in range(35) for r in tree_rows(f"{i}/0", 8192, (3000, 3000, 5000, 5000), (5000,) * 4)]
    (update,) = arrange_updates(rows, rows_per_update=192, num_ranks=8, rows_per_rank=1, max_tokens=65_536, seed="s")
    loads = rank_loads(update)
    assert max(loads) <= 1.1 * sum(loads) / 8
    assert sum(loads) <= 1.1 * sum(map(unique_tokens, group_trees(rows)))  # few prefixes are forwarded twice


def test_rows_of_like_length_share_a_micro_batch_and_all_are_as_full():
    rows = [row(length, leaf=length) for length in (9, 1, 8, 2, 7, 3, 6)]
    update = micro_batches_by_rows(rows, 2, 2)
    assert [[[r.length for r in part] for part in micro_batch] for micro_batch in update] == [
        [[9, 7], [8, 6]],
        [[2], [3, 1]],
    ]
