"""The rhythm reward against closed forms, a loop written from the definition, and dense attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.rhythm.advantages import combine_advantages
from attn_trainers.rhythm.attention_rows import (
    attention_row_blocks,
    breadth_and_concentration,
    row_breadth,
    row_concentration,
)
from attn_trainers.rhythm.credit import anchor_tokens
from attn_trainers.rhythm.metrics import rhythm_metrics
from attn_trainers.rhythm.options import RhythmRewardOptions
from attn_trainers.rhythm.reward import chunk_starts, rhythm_reward, unit_ranks


NAN = math.nan
VALUES = RhythmRewardOptions(reward_rank=False)

signal_values = st.sampled_from([0.0, 0.2, 0.4, 0.5, 1.0])
maybe_nan = st.one_of(signal_values, st.just(NAN))
responses = st.lists(st.tuples(signal_values, maybe_nan, maybe_nan, maybe_nan), min_size=1, max_size=40)


def by_definition(fai, breadth, concentration, starts):
    """R of each chunk from ranks, one token at a time."""

    def ranks(values):
        defined = [x for x in values if not math.isnan(x)]
        span = len(defined) - 1
        below = {x: sum(y < x for y in defined) + (sum(y == x for y in defined) - 1) / 2 for x in defined}
        return [0.5 if math.isnan(x) or span < 1 else below[x] / span for x in values]

    broad, focused = ranks(breadth), ranks(concentration)
    n = len(fai)
    strong = [-1.0 if math.isnan(x) else x for x in fai]
    ranked = sorted((t for t in range(n) if not math.isnan(fai[t])), key=lambda t: (-fai[t], t))
    anchors = set(ranked[: math.floor(0.4 * n + 0.5)])
    rewards = []
    for a, e in zip(starts, [*starts[1:], n], strict=True):
        strongest = max(range(a, e), key=lambda t: (strong[t], -t))
        key = strongest in anchors and strongest <= a + 3
        preplan, anchor = sum(broad[a : a + 2]) / 2, sum(focused[a + 2 : e]) / (e - a - 2)
        rewards.append(2 * (0.4 * preplan + 0.4 * anchor + 0.2 * key) - 1)
    return rewards


def test_chunks_of_the_key_case(key_case):
    waad, fai = key_case()
    reward = rhythm_reward(waad, fai, waad, waad)
    assert reward.chunk_starts.tolist() == [0, 5, 11, 16]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.sets(st.integers(0, 45)))
def test_chunks_are_long_enough(n, candidates):
    starts = chunk_starts(torch.tensor(sorted(candidates), dtype=torch.long), n).tolist()
    assert starts[0] == 0
    assert set(starts[1:]) <= candidates
    if n >= 4:
        assert all(end - start >= 4 for start, end in zip(starts, [*starts[1:], n], strict=True))
    for candidate in candidates - set(starts):  # every dropped one would have made a chunk too short
        assert n - candidate < 4 or any(0 <= candidate - start < 4 for start in starts)


def test_unit_ranks():
    ranks = unit_ranks(torch.tensor([3.0, 1.0, NAN, 3.0, 2.0, 9.0]))
    assert ranks.tolist() == [0.625, 0.0, 0.5, 0.625, 0.25, 1.0]
    assert unit_ranks(torch.tensor([NAN, 4.0])).tolist() == [0.5, 0.5]
    assert unit_ranks(torch.full((3,), 7.0)).tolist() == [0.5, 0.5, 0.5]


def test_extreme_rhythms_of_the_key_case(key_case):
    waad, fai = key_case()  # each chunk's strongest token is an anchor within reach: Km = 1 throughout
    ones = torch.ones(20, dtype=torch.float64)
    perfect = rhythm_reward(waad, fai, ones, ones, VALUES)
    assert perfect.per_token.tolist() == pytest.approx([1.0] * 20, abs=1e-12)
    assert perfect.mean == pytest.approx(1.0, abs=1e-12)
    assert rhythm_reward(waad, fai, 0 * ones, -ones, VALUES).mean == pytest.approx(-0.6, abs=1e-12)
    # The strongest token ends each chunk: out of reach in the first three, which get -1; the last has four tokens.
    late = torch.where(torch.tensor([t in (4, 10, 15, 19) for t in range(20)]), 0.9, 0.1)
    assert rhythm_reward(waad, late, 0 * ones, -ones, VALUES).mean == pytest.approx(
        (16 * -1.0 + 4 * -0.6) / 20, abs=1e-12
    )
    # All ranks tied: 2 (0.2 + 0.2 + 0.2) - 1.
    assert rhythm_reward(waad, fai, ones, ones).mean == pytest.approx(0.2, abs=1e-12)


def test_one_chunk_with_key_and_norms(key_case):
    waad, fai = key_case()
    breadth = torch.zeros(20, dtype=torch.float64)
    breadth[:2] = 1.0  # only the first chunk, of 5 tokens, starts broad: R = 0.2 + 0.8 - 0.6; the others -0.6 + 0
    concentration = torch.full((20,), -1.0, dtype=torch.float64)
    expected = [0.2, -0.6, -0.6, -0.6]
    reward = rhythm_reward(waad, fai, breadth, concentration, VALUES)
    assert reward.chunk_rewards.tolist() == pytest.approx(expected, abs=1e-12)
    assert reward.per_token.tolist() == pytest.approx([0.2] * 5 + [-0.6] * 15, abs=1e-12)
    assert reward.mean == pytest.approx((5 * 0.2 - 15 * 0.6) / 20, abs=1e-12)
    for norm, value in (("chunk_mean", -0.4), ("sum", -1.6)):
        options = RhythmRewardOptions(reward_rank=False, reward_norm=norm)
        assert rhythm_reward(waad, fai, breadth, concentration, options).mean == pytest.approx(value, abs=1e-12)


def test_line_starts(key_case):
    waad, fai = key_case()
    options = RhythmRewardOptions(reward_segment="newline")
    reward = rhythm_reward(waad, fai, waad, waad, options, line_starts=torch.tensor([0, 3, 8, 10, 13, 18]))
    assert reward.chunk_starts.tolist() == [0, 8, 13]


@settings(max_examples=200, deadline=None)
@given(responses)
def test_reward_by_its_definition(rows):
    waad, fai, breadth, concentration = torch.tensor(rows, dtype=torch.float64).T
    reward = rhythm_reward(waad, fai, breadth, concentration)
    n = len(rows)
    assert reward.per_token.shape == (n,)
    assert reward.per_token.abs().max() <= 1
    if n < 8 or any(signal.isnan().all() for signal in (fai, breadth, concentration)):
        assert (reward.mean, reward.per_token.tolist()) == (0.0, [0.0] * n)
        return
    starts = reward.chunk_starts.tolist()
    expected = by_definition(fai.tolist(), breadth.tolist(), concentration.tolist(), starts)
    assert reward.chunk_rewards.tolist() == pytest.approx(expected, abs=1e-12)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], n], strict=True)]
    per_token = [value for value, length in zip(expected, lengths, strict=True) for _ in range(length)]
    assert reward.per_token.tolist() == pytest.approx(per_token, abs=1e-12)
    assert reward.mean == pytest.approx(sum(per_token) / n, abs=1e-12)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_short_responses_get_nothing(n):
    values = torch.rand(4, n, generator=torch.Generator().manual_seed(0))
    reward = rhythm_reward(*values)
    assert (reward.mean, reward.per_token.tolist()) == (0.0, [0.0] * n)


def test_undefined_signals_give_nothing():
    good, undefined = torch.arange(12.0), torch.full((12,), NAN)
    for at in range(4):
        signals = [undefined if i == at else good for i in range(4)]
        assert rhythm_reward(*signals).mean == 0.0


def test_independent_noise_is_worth_almost_nothing():
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(800):
        waad, fai, breadth, concentration = torch.rand(4, 200, generator=generator, dtype=torch.float64)
        fai[-10:] = NAN
        values.append(rhythm_reward(waad, fai, breadth, concentration).mean)
    values = torch.tensor(values, dtype=torch.float64)
    # Standard errors over 800 draws: 0.0018 of the mean, 0.0013 of the deviation. 0.02 and 0.05 are rounded values.
    assert values.mean().item() == pytest.approx(0.02, abs=0.005 + 3 * 0.0018)
    assert values.std().item() == pytest.approx(0.05, abs=0.005 + 3 * 0.0013)


def test_breadth_closed_forms():
    positions = torch.tensor([4, 4, 4, 1, 2])
    rows = torch.tensor(
        [
            [0.6, 0.1, 0.1, 0.1, 0.1],  # uniform once the sink is left out
            [0.5, 0.5, 0.0, 0.0, 0.0],  # one key
            [0.0, 0.5, 0.5, 0.0, 0.0],  # two of four keys: log 2 / log 4
            [0.5, 0.5, 0.0, 0.0, 0.0],  # a single key besides the sink: undefined
            [1.0, 0.0, 0.0, 0.0, 0.0],  # nothing besides the sink: undefined
        ]
    )
    breadth = row_breadth(rows, positions)
    assert breadth[:3].tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-6)
    assert breadth[3:].isnan().all()
    no_sink = row_breadth(rows[1:2], positions[1:2], sink_tokens=0).item()
    assert no_sink == pytest.approx(math.log(2) / math.log(5), abs=1e-6)


def test_concentration_closed_forms():
    anchors = torch.tensor([True, False, False, False, False, False])
    rows = torch.tensor(
        [
            [0.2, 0.2, 0.4, 0.0, 0.0, 0.2],  # prompt of 2; earlier response mass all on the anchor: 1
            [0.2, 0.2, 0.1, 0.1, 0.1, 0.3],  # a third of it on one of three: chance, 0
            [0.2, 0.2, 0.0, 0.1, 0.1, 0.4],  # none of it: -p / (1 - p) with p = 1/3
            [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],  # first response token: nothing earlier
            [0.3, 0.3, 0.3, 0.1, 0.0, 0.0],  # only anchors earlier
        ]
    )
    concentration = row_concentration(rows, torch.tensor([5, 5, 5, 2, 3]), anchors, prompt_length=2)
    assert concentration[:3].tolist() == pytest.approx([1.0, 0.0, -0.5], abs=1e-6)
    assert concentration[3:].isnan().all()


def dense_map(queries, keys, windows):
    """Mean causal softmax map (N, N) over all heads, in float64."""
    maps = []
    for query, key, window in zip(queries, keys, windows, strict=True):
        n = query.shape[1]
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            allowed &= ~torch.ones(n, n, dtype=torch.bool).tril(-window)
        logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
        maps.append(logits.masked_fill(~allowed, -math.inf).softmax(-1))
    return torch.cat(maps).mean(0)


@pytest.mark.parametrize("windows", [None, [None, 12]])
@pytest.mark.parametrize("block_rows", [1, 7, 256])
def test_blocks_equal_dense_attention(windows, block_rows):
    generator = torch.Generator().manual_seed(0)
    prompt_length, n = 9, 41
    shapes = [(3, prompt_length + n, 8), (2, prompt_length + n, 16)]
    queries = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    keys = [torch.randn(shape, generator=generator) for shape in shapes]
    fai = torch.rand(n, generator=generator)
    fai[-10:] = NAN
    dense = dense_map(queries, keys, windows or [None, None])
    blocks = list(attention_row_blocks(queries, keys, prompt_length, block_rows=block_rows, windows=windows))
    assert torch.cat([positions for _, positions in blocks]).tolist() == list(range(prompt_length, prompt_length + n))
    for rows, positions in blocks:
        assert torch.allclose(rows.double(), dense[positions, : rows.shape[1]], rtol=1e-5, atol=1e-7)

    breadth, concentration = breadth_and_concentration(
        queries, keys, fai, prompt_length, block_rows=block_rows, windows=windows
    )
    anchors = set(anchor_tokens(fai, 0.1).nonzero().squeeze(1).tolist())
    assert len(anchors) == 4
    for t in range(n):
        row = dense[prompt_length + t].tolist()
        past = row[1 : prompt_length + t + 1]
        shares = [x / sum(past) for x in past]
        entropy = -sum(x * math.log(x) for x in shares if x > 0)
        assert breadth[t].item() == pytest.approx(entropy / math.log(len(past)), rel=1e-4)
        earlier = row[prompt_length : prompt_length + t]
        chance = sum(s < t for s in anchors) / t if t else 1.0
        if chance == 1.0:
            assert concentration[t].isnan()
            continue
        share = sum(x for s, x in enumerate(earlier) if s in anchors) / sum(earlier)
        assert concentration[t].item() == pytest.approx((share - chance) / (1 - chance), rel=1e-4, abs=1e-5)


def test_row_lengths_must_add_up():
    queries = [torch.zeros(1, 10, 4)]
    with pytest.raises(ValueError, match=r"queries hold 10 positions; give prompt_length \+ len\(fai\) = 12"):
        breadth_and_concentration(queries, queries, torch.zeros(8), 4)


def test_lambda_zero_returns_the_input_itself():
    task = torch.randn(8)
    for mode in ("split", "total", "token"):
        assert combine_advantages(task, torch.randn(8), 4, 0.0, mode) is task


def test_split_mode():
    task = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    rhythm = torch.tensor([0.4, 0.0, -0.4, 0.30, 0.31, 0.32], dtype=torch.float64)
    combined = combine_advantages(task, rhythm, 3, 0.1)
    # Standard deviations 0.4 and 0.01, the second of which is raised to 0.05.
    expected = [1.1, -1.0, 0.4, -0.02, 0.0, 0.02]
    assert combined.tolist() == pytest.approx(expected, abs=1e-12)


def test_total_mode_is_grpo_on_the_sum():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    rhythm = torch.tensor([0.5, -0.5, 0.5, 0.0], dtype=torch.float64)
    combined = combine_advantages(torch.zeros(4, dtype=torch.float64), rhythm, 4, 0.2, "total", task_rewards=rewards)
    total = [1.1, -0.1, 0.1, 1.0]
    mean = sum(total) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in total) / 3)
    assert combined.tolist() == pytest.approx([(x - mean) / (std + 1e-4) for x in total], abs=1e-12)


def test_total_mode_leaves_unscored_rows_out():
    task = torch.tensor([1.0, 0.0, math.nan, 1.0])
    rhythm = torch.tensor([0.5, -0.5, 0.9, 0.1])
    advantages = combine_advantages(torch.zeros(4), rhythm, 4, 0.1, "total", task_rewards=task)
    scored = torch.tensor([1.05, -0.05, 1.01])
    expected = (scored - scored.mean()) / (scored.std() + 1e-4)
    assert advantages[2] == 0.0
    torch.testing.assert_close(advantages[[0, 1, 3]], expected)


def test_token_mode_centres_over_the_tokens_of_the_group():
    task = torch.tensor([1.0, -1.0], dtype=torch.float64)
    per_token = torch.tensor([[0.5, 0.5, -0.2], [-0.4, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    combined = combine_advantages(task, per_token, 2, 0.1, "token", mask=mask)
    expected = [[1.04, 1.04, 0.97], [-1.05, -1.0, -1.0]]  # mean of 0.5, 0.5, -0.2, -0.4 is 0.1; padding as it was
    assert combined.flatten().tolist() == pytest.approx(sum(expected, []), abs=1e-12)


def test_gate_leaves_wrong_answers_alone():
    task = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    rhythm = torch.tensor([0.3, 0.9, -0.1, -0.9], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False])
    std = math.sqrt(2 * 0.2**2)
    split = combine_advantages(task, rhythm, 4, 0.1, gate="correct_only", correct=correct)
    assert split.tolist() == pytest.approx([1 + 0.02 / std, -1.0, 0.5 - 0.02 / std, 2.0], abs=1e-12)
    token = combine_advantages(
        task, rhythm[:, None], 4, 0.1, "token", gate="correct_only", correct=correct, mask=torch.ones(4, 1)
    )
    assert token.flatten().tolist() == pytest.approx([1.02, -1.0, 0.48, 2.0], abs=1e-12)
    rewards = correct.double()
    total = combine_advantages(
        task, rhythm, 4, 0.1, "total", gate="correct_only", correct=correct, task_rewards=rewards
    )
    gated = combine_advantages(task, rhythm * rewards, 4, 0.1, "total", task_rewards=rewards)
    assert torch.equal(total, gated)
    nobody = combine_advantages(task, rhythm, 4, 0.1, gate="correct_only", correct=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(nobody, task)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.2, 1.0]), min_size=8, max_size=8), st.sampled_from([0.03, 0.1, 0.3])
)
def test_split_adds_nothing_to_a_group_on_average(values, lam):
    task = torch.linspace(-1, 1, 8, dtype=torch.float64)
    combined = combine_advantages(task, torch.tensor(values, dtype=torch.float64), 4, lam)
    added = (combined - task).view(2, 4)
    assert added.sum(1).abs().max() < 1e-12
    # A group's added advantages have at most lam as their standard deviation.
    assert added.std(1).max() <= lam + 1e-12


def test_metrics():
    means = torch.tensor([0.4, 0.2, -0.2, 0.0])
    correct = torch.tensor([1, 1, 0, 0])
    metrics = rhythm_metrics(means, correct, torch.tensor([40, 30, 10, 20]), torch.tensor([4, 2, 1, 2]))
    expected = {
        "reward/correct": 0.3,
        "reward/wrong": -0.1,
        "reward/correlation_correct": 0.2 / math.sqrt(0.05),  # mean difference times 1/2 over the population deviation
        "reward/correlation_length": 1.0,
        "reward/chunks_per_100_tokens": 9.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_bad_calls_are_named():
    task, waad = torch.zeros(4), torch.arange(12.0)
    with pytest.raises(ValueError, match="reward_norm='mean'"):
        RhythmRewardOptions(reward_norm="mean")
    with pytest.raises(ValueError, match="reward_segment='sentence'"):
        RhythmRewardOptions(reward_segment="sentence")
    with pytest.raises(ValueError, match="line_starts=None"):
        rhythm_reward(waad, waad, waad, waad, RhythmRewardOptions(reward_segment="newline"))
    with pytest.raises(ValueError, match=r"breadth has shape \(11,\)"):
        rhythm_reward(waad, waad, waad[1:], waad)
    with pytest.raises(ValueError, match="mode='sum'"):
        combine_advantages(task, task, 4, 0.1, "sum")
    with pytest.raises(ValueError, match="gate='wrong_only'"):
        combine_advantages(task, task, 4, 0.1, gate="wrong_only")
    with pytest.raises(ValueError, match="group_size=3"):
        combine_advantages(task, task, 3, 0.1)
    with pytest.raises(ValueError, match="correct=None"):
        combine_advantages(task, task, 4, 0.1, gate="correct_only")
    with pytest.raises(ValueError, match="task_rewards=None"):
        combine_advantages(task, task, 4, 0.1, "total")
    with pytest.raises(ValueError, match="mask=None"):
        combine_advantages(task, task[:, None], 4, 0.1, "token")
