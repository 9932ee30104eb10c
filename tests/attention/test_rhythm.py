"""WAAD, FAI and head ranking against dense maps, closed forms and reference values."""

import math

import pytest
import torch

from attn_trainers.attention import (
    RhythmObserver,
    combine_heads,
    forward_for_attention,
    mean_backward_span,
    middle_layers,
    rank_heads,
    rhythm_signals,
)
from attn_trainers.attention.rhythm import rhythm_sums


def dense_rhythm(maps, prompt, window, low, high):
    """Eq. 7, 9 and 10, literally, from maps (..., N, N): d, WAAD and FAI per head."""
    length = maps.shape[-1]
    position = torch.arange(length, dtype=torch.float64)
    distance = position[:, None] - position  # (t, s)
    span = (maps * distance).sum(dim=-1)[..., prompt:].mean(dim=-1)
    waad = (maps * distance.clamp(max=window)).sum(dim=-1)[..., prompt:]
    fai = torch.full_like(waad, torch.nan)
    for s in range(prompt, length):
        last = length - 1 if high is None else min(length - 1, s + high)
        if s + low <= last:
            fai[..., s - prompt] = maps[..., s + low : last + 1, s].mean(dim=-1)
    return span, waad, fai


@pytest.mark.parametrize("horizon", [(10, 100), (0, 20), (0, None), (10, None)])
def test_profiles_equal_eager_attention(decoder, batch, eager, horizon):
    observer = RhythmObserver(batch.mask, batch.prompt_lengths, layers=[0, 2], window=10, horizon=horizon)
    forward_for_attention(decoder, batch.ids, batch.mask, observer)
    for row, profile in enumerate(observer.result()):
        maps = eager(decoder, batch.sequence(row))[[0, 2]].flatten(0, 1)
        span, waad, fai = dense_rhythm(maps, batch.prompt_lengths[row], 10, *horizon)
        assert profile.heads == [(layer, head) for layer in (0, 2) for head in range(4)]
        torch.testing.assert_close(mean_backward_span([profile]).double(), span, rtol=1e-5, atol=0)
        torch.testing.assert_close(profile.waad.double(), waad, rtol=1e-5, atol=0)
        torch.testing.assert_close(profile.fai.double(), fai, rtol=1e-5, atol=0, equal_nan=True)


def test_reference_values(golden):
    model, cases = golden
    for case in cases:
        ids = torch.tensor([case["input_ids"]])
        (found,) = rhythm_signals(model, ids, torch.ones_like(ids), [case["prompt_length"]], layers=range(3))
        assert found.local_heads == [tuple(head) for head in case["local_heads"]]
        assert found.global_heads == [tuple(head) for head in case["global_heads"]]
        fai = torch.tensor([math.nan if value is None else value for value in case["fai"]])
        torch.testing.assert_close(found.waad, torch.tensor(case["waad"]), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.fai, fai, rtol=1e-5, atol=0, equal_nan=True)
        torch.testing.assert_close(
            found.mean_backward_span.view(3, 4), torch.tensor(case["mean_backward_span"]), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("horizon", [(2, 30), (2, None)])
def test_uniform_attention_has_a_closed_form(uniform_qwen2, horizon):
    length, prompt = 150, 12
    ids = torch.arange(length)[None] % 90
    (found,) = rhythm_signals(uniform_qwen2, ids, torch.ones_like(ids), [prompt], layers=[1], horizon=horizon)
    waad = [sum(min(t - s, 10) for s in range(t + 1)) / (t + 1) for t in range(prompt, length)]
    torch.testing.assert_close(found.waad, torch.tensor(waad), rtol=1e-5, atol=0)
    fai = []
    for s in range(prompt, length):
        later = range(s + 2, length if horizon[1] is None else min(length, s + 31))
        fai.append(sum(1 / (t + 1) for t in later) / len(later) if later else math.nan)
    torch.testing.assert_close(found.fai, torch.tensor(fai), rtol=1e-5, atol=0, equal_nan=True)
    span = sum(t / 2 for t in range(prompt, length)) / (length - prompt)
    torch.testing.assert_close(found.mean_backward_span, torch.full((4,), span), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_attention_to_oneself_has_no_distance(sliding_window):
    # Keys are axes, so token t attends to itself with weight 1 up to exp(-400).
    query = 20 * torch.eye(32).expand(2, 32, 32)
    span, waad, fai = rhythm_sums(query, query, 1.0, sliding_window, first_row=4, window=10, horizon=(1, 8))
    assert span.tolist() == [0.0, 0.0]
    assert waad.tolist() == [[0.0] * 28] * 2
    assert fai[:, :-1].tolist() == [[0.0] * 27] * 2
    assert fai[:, -1].isnan().all()


def test_long_sequences_use_wider_blocks_of_keys():
    # Head dimension 8 leaves 7 columns for blocks: 1,200 tokens need blocks of 172 rather than 128.
    torch.manual_seed(0)
    query, key = torch.randn(4, 1200, 8), torch.randn(2, 1200, 8)
    scores = (query.double() @ key.double().repeat_interleave(2, dim=0).mT).masked_fill(
        torch.ones(1200, 1200).triu(1).bool(), -torch.inf
    )
    span, waad, fai = dense_rhythm(scores.softmax(dim=-1), 130, 10, 10, 100)
    found = rhythm_sums(query, key, 1.0, None, first_row=130, window=10, horizon=(10, 100))
    torch.testing.assert_close(found[0].double() / 1070, span, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), waad, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[2].double(), fai, rtol=1e-5, atol=0, equal_nan=True)


def test_head_scopes(qwen2, batch):
    arguments = (qwen2, batch.ids, batch.mask, batch.prompt_lengths)
    by_sequence = rhythm_signals(*arguments, layers=[0, 1, 2])
    by_batch = rhythm_signals(*arguments, layers=[0, 1, 2], head_scope="batch")
    tokens = [length - prompt for length, prompt in zip(batch.lengths, batch.prompt_lengths, strict=True)]
    pooled = sum(one.mean_backward_span * n for one, n in zip(by_sequence, tokens, strict=True)) / sum(tokens)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    order = sorted(range(12), key=lambda i: pooled[i].item())
    for one in by_batch:
        assert one.local_heads == [heads[i] for i in order[:3]]
        assert one.global_heads == [heads[i] for i in order[-3:]]
    given = rhythm_signals(*arguments, layers=[0, 1, 2], head_scope=(by_sequence[1].local_heads, [(2, 3)]))
    torch.testing.assert_close(given[1].waad, by_sequence[1].waad, rtol=0, atol=0)
    assert given[0].global_heads == [(2, 3)]


def test_ranking():
    heads = [(0, 0), (0, 1), (1, 0), (1, 1)]
    span = torch.tensor([3.0, 1.0, 1.0, 2.0])
    assert rank_heads(span, heads, 0.5) == ([(0, 1), (1, 0)], [(1, 1), (0, 0)])
    assert rank_heads(span, heads, 0.01) == ([(0, 1)], [(0, 0)])
    assert rank_heads(span, heads, 1.0) == ([(0, 1), (1, 0), (1, 1), (0, 0)],) * 2
    ten = [(0, head) for head in range(10)]
    assert len(rank_heads(torch.arange(10.0), ten, 0.7)[0]) == 7  # although 0.7 * 10 may fall short of 7 in floats
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="head_fraction="):
            rank_heads(span, heads, fraction)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (36, [12, 15, 18, 21, 24]),
        (32, [10, 13, 16, 18, 21]),
        (28, [9, 11, 14, 16, 18]),
        (24, [8, 10, 12, 14, 16]),
        (6, [2, 3, 4]),
        (3, [1, 2]),
        (1, [0]),
    ],
)
def test_middle_layers(num_layers, expected):
    assert middle_layers(num_layers) == expected


def test_responses_without_tokens_are_empty(qwen2):
    ids = torch.arange(24).view(3, 8)
    mask = torch.tensor([[0] * 8, [1] * 8, [1] * 8])
    for scope in ("sequence", "batch"):
        found = rhythm_signals(qwen2, ids, mask, [0, 8, 7], head_scope=scope)
        assert [one.waad.shape[0] for one in found] == [0, 0, 1]
        assert found[2].fai.isnan().all()
    found = rhythm_signals(qwen2, ids[:1], mask[:1], [0])
    assert found[0].waad.shape == found[0].fai.shape == (0,)


def test_arguments_out_of_range_are_refused(qwen2):
    mask = torch.ones(1, 6, dtype=torch.long)
    for arguments, message in [
        ({"layers": []}, "name at least one layer"),
        ({"window": 0}, "window=0"),
        ({"horizon": (5, 4)}, r"horizon=\(5, 4\)"),
        ({"horizon": (-1, None)}, r"horizon=\(-1, None\)"),
        ({"prompt_lengths": [7]}, r"prompt_lengths\[0\]=7"),
    ]:
        with pytest.raises(ValueError, match=message):
            RhythmObserver(mask, **{"prompt_lengths": [2], "layers": [0], **arguments})
    with pytest.raises(ValueError, match='head_scope="token"'):
        rhythm_signals(qwen2, mask, mask, [2], head_scope="token")
    with pytest.raises(ValueError, match=r"layers=\[3\]: Qwen2Model has layers 0 to 2"):
        rhythm_signals(qwen2, mask, mask, [2], layers=[3])
    observer = RhythmObserver(mask, [2], [1])
    forward_for_attention(qwen2, mask, mask, observer)
    with pytest.raises(ValueError, match=r"global_heads=\[\(0, 0\)\].*layers \[1\]"):
        combine_heads(observer.result()[0], [(1, 0)], [(0, 0)])
