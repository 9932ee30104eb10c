"""Row offset, FAI of the last tokens and the measures of the rhythm reward, against dense eager attention."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_trainers.attention import combine_heads, forward_for_attention, rhythm_signals
from attn_trainers.attention.heads import HeadSets
from attn_trainers.rhythm.attention_rows import ANCHOR_FRACTION, row_breadth, row_concentration
from attn_trainers.rhythm.credit import anchor_tokens
from attn_trainers.rhythm.observers import RewardObserver, SignalObserver, without_last_token


LAYERS = [1, 2]
PROMPTS = [5, 9, 7]
COUNTS = [30, 12, 0]  # response tokens; the last row's completion is masked out


@pytest.fixture(scope="module")
def model(sharp_model_dir):
    return AutoModelForCausalLM.from_pretrained(sharp_model_dir, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (3, 39), prompts padded on the left, completions on the right."""
    ids = torch.randint(10, 200, (3, 39), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        mask[row, 9 - prompt : 9 + count] = 1
    return ids, mask


@pytest.fixture(scope="module")
def maps(model, batch) -> list[torch.Tensor]:
    """Per row, eager attention (layers, heads, N, N) of its real tokens."""
    ids, mask = batch
    found = []
    for row in range(3):
        with torch.no_grad():
            attentions = model(ids[row][mask[row].bool()][None], output_attentions=True).attentions
        found.append(torch.stack([attentions[layer][0] for layer in LAYERS]))
    return found


def observe(model, batch, observer):
    ids, mask = batch
    for row in range(3):  # in several forwards, as TRL computes old log-probs
        forward_for_attention(model, ids[row : row + 1], mask[row : row + 1], observer)
    return observer.result()


def test_without_last_token():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert without_last_token(mask).tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(("window", "low", "high"), [(10, 10, 100), (4, 0, 5), (6, 3, None)])
def test_generating_rows_are_the_rows_one_earlier(model, batch, maps, window, low, high):
    ids, mask = batch
    observer = SignalObserver(mask, PROMPTS, LAYERS, window, (low, high), row_offset=-1)
    profiles = observe(model, batch, observer)
    for row, profile in enumerate(profiles):
        count, prompt = COUNTS[row], PROMPTS[row]
        weights = maps[row].flatten(0, 1)  # (C, N, N)
        assert profile.waad.shape == profile.fai.shape == (8, count)
        earlier = torch.zeros_like(weights)
        earlier[:, 1:] = weights[:, :-1]  # A'[t, s] = A[t - 1, s]
        length = weights.shape[1]
        t, s = torch.arange(length)[:, None], torch.arange(length)
        waad = (earlier * (t - s).clamp(0, window)).sum(dim=2)[:, prompt:]
        torch.testing.assert_close(profile.waad, waad, rtol=1e-4, atol=1e-4)
        reach = length if high is None else high
        seen = (t >= prompt) & (t - s >= max(low, 1)) & (t - s <= reach)  # no row generates a token and attends to it
        expected = (earlier * seen).sum(dim=1) / seen.sum(dim=0).where(seen.any(dim=0), torch.tensor(torch.nan))
        torch.testing.assert_close(profile.fai, expected[:, prompt:], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_fai_of_the_last_tokens(model, batch, maps):
    ids, mask = batch
    literal, zero, nearest = (
        observe(model, batch, SignalObserver(mask, PROMPTS, LAYERS, fai_tail=tail))
        for tail in ("undefined", "zero", "nearest")
    )
    for row in range(2):
        count = COUNTS[row]
        tail = torch.arange(count) >= count - 10
        assert literal[row].fai.isnan().any(dim=0).tolist() == tail.tolist()
        assert (zero[row].fai[:, tail] == 0).all()
        last_row = maps[row].flatten(0, 1)[:, -1, -count:]
        torch.testing.assert_close(nearest[row].fai[:, tail], last_row[:, tail], rtol=1e-4, atol=1e-6)
        for other in (zero, nearest):
            assert torch.equal(other[row].fai[:, ~tail], literal[row].fai[:, ~tail])
    assert nearest[2].fai.shape == (8, 0)


@pytest.mark.parametrize("sink_tokens", [0, 1])
def test_breadth_and_concentration_of_known_heads(model, batch, maps, sink_tokens):
    ids, mask = batch
    heads = HeadSets([(1, 0)], [(2, 3), (1, 2), (1, 1)])
    observer = RewardObserver(mask, PROMPTS, LAYERS, [heads] * 3, sink_tokens=sink_tokens)
    profiles = observe(model, batch, observer)
    plain = rhythm_signals(model, ids, mask, PROMPTS, layers=LAYERS, head_scope=heads)
    for row in range(2):
        signals = combine_heads(profiles[row], *heads)
        torch.testing.assert_close(signals.fai, plain[row].fai, equal_nan=True)
        mean_map = torch.stack([maps[row][layer - 1, head] for layer, head in heads.global_heads]).mean(dim=0)
        positions = torch.arange(PROMPTS[row], PROMPTS[row] + COUNTS[row])
        breadth, concentration = observer.measures[row]
        expected = row_breadth(mean_map[positions], positions, sink_tokens)
        torch.testing.assert_close(breadth, expected, rtol=1e-4, atol=1e-5)
        anchors = anchor_tokens(signals.fai, ANCHOR_FRACTION)
        expected = row_concentration(mean_map[positions], positions, anchors, PROMPTS[row])
        torch.testing.assert_close(concentration, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert observer.measures[2] is None
    assert observer._kept == {}  # no queries or keys outlive their forward
