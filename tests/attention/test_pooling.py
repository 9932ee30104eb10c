"""Pooled sums of attention weights against dense maps of random queries and keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attention.pooling import lagged_step_attention, received_attention, row_weights


def dense(query, key, sliding_window):
    length = query.shape[1]
    position = torch.arange(length)
    distance = position[:, None] - position
    hidden = distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    keys = key.double().repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    return (query.double() @ keys.mT).masked_fill(hidden, -torch.inf).softmax(dim=-1)


@st.composite
def partitions(draw):
    """A sequence length and steps that cover it but for gaps here and there."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=40))
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    steps = list(zip(edges[:-1], edges[1:], strict=True))
    left_out = draw(st.sets(st.integers(0, len(steps) - 1), max_size=3))
    kept = [step for index, step in enumerate(steps) if index not in left_out]
    return edges[-1], kept or steps


@settings(max_examples=60, deadline=None)
@given(
    partition=partitions(),
    delta=st.integers(0, 5),
    sliding_window=st.sampled_from([None, 1, 7, 64, 10_000]),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    width=st.sampled_from([4, 8]),
    seed=st.integers(0, 3),
)
def test_lagged_step_attention_equals_dense(partition, delta, sliding_window, groups, width, seed):
    length, steps = partition
    torch.manual_seed(seed)
    query, key = torch.randn(groups[0], length, width), torch.randn(groups[1], length, width)
    columns = range(min(1, len(steps)), max(len(steps) - delta, min(1, len(steps))))
    found = lagged_step_attention(query, key, 1.0, sliding_window, steps, columns, delta)
    weights = dense(query, key, sliding_window)
    pool = torch.zeros(len(steps), length, dtype=torch.float64)
    for step, (start, end) in enumerate(steps):
        pool[step, start:end] = 1 / (end - start)
    alpha = pool @ weights @ pool.T
    expected = torch.stack([alpha[:, k + delta :, k].sum(dim=-1) for k in columns], dim=1) if columns else found
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 90),
    sliding_window=st.sampled_from([None, 1, 7, 64]),
    heads=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_received_attention_equals_dense_and_sums_to_the_rows(length, sliding_window, heads, data):
    first_row = data.draw(st.integers(0, length))
    query, key = torch.randn(6, length, 8), torch.randn(2, length, 8)
    found = received_attention(query, key, 1.0, sliding_window, heads, first_row)
    expected = dense(query, key, sliding_window)[heads, first_row:].sum(dim=1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.sum(dim=1), torch.full((len(heads),), float(length - first_row)))


def test_row_weights_are_normalised_over_the_keys_asked_for():
    torch.manual_seed(0)
    query, key = torch.randn(4, 50, 8), torch.randn(2, 50, 8)
    weights, distance = row_weights(query, key, 1.0, None, range(30, 35), first_key=20)
    whole = dense(query, key, None)[:, 30:35, 20:35]
    torch.testing.assert_close(weights, (whole / whole.sum(dim=-1, keepdim=True)).float(), rtol=1e-5, atol=1e-12)
    assert distance[0].tolist() == list(range(10, -5, -1))


def test_bfloat16_keeps_three_digits():
    torch.manual_seed(0)
    query, key = torch.randn(4, 400, 16).bfloat16(), torch.randn(2, 400, 16).bfloat16()
    steps = [(start, start + 10) for start in range(0, 400, 10)]  # 40 steps: two levels
    found = lagged_step_attention(query, key, 1.0, None, steps, range(2, 36), 4)
    exact = lagged_step_attention(query.float(), key.float(), 1.0, None, steps, range(2, 36), 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=4e-3, atol=0)
