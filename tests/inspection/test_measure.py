"""Inspection of responses: values against separate computations."""

import math

import pytest
import torch

from attn_trainers.attention import forward_context_influence, key_focus_scores, rhythm_signals
from attn_trainers.inspection.analysis import column_kurtosis
from attn_trainers.inspection.measure import (
    InspectionSettings,
    find_receiver_heads,
    inspect_response,
    response_couplings,
    summarise_couplings,
    token_entropies,
)
from attn_trainers.rhythm.credit import credit_sets


def test_signals_are_those_of_separate_forwards(
    model, tiny_tokenizer, prompt_ids, completions, key_focus_heads, inspected
):
    response = inspected[0]
    ids = torch.tensor([prompt_ids + tiny_tokenizer(completions[0])["input_ids"]])
    mask, prompt = torch.ones_like(ids), len(prompt_ids)
    signals = rhythm_signals(model, ids, mask, [prompt], layers=range(3))[0]
    torch.testing.assert_close(response.waad, signals.waad)
    torch.testing.assert_close(response.fai, signals.fai, equal_nan=True)
    to_the_end = rhythm_signals(model, ids, mask, [prompt], layers=range(3), horizon=(10, None))[0]
    torch.testing.assert_close(response.analysis_fai(10), to_the_end.fai, equal_nan=True)
    assert (response.local_heads, response.global_heads) == (signals.local_heads, signals.global_heads)
    sets = credit_sets(signals.waad, signals.fai)
    assert torch.equal(response.preplan, sets.preplan) and torch.equal(response.anchors, sets.anchors)
    assert "".join(response.tokens) == completions[0]
    steps = response.influence.ranges
    assert ["".join(response.tokens[a:b]) for a, b in steps][:2] == ["17 + 3 = 20\n\n", "20 - 4 = 16\n\n"]
    absolute = [(0, prompt), *((a + prompt, b + prompt) for a, b in steps)]
    influence = forward_context_influence(model, ids, mask, [absolute], [len(steps)], delta=2)[0]
    assert response.influence.scores == pytest.approx(influence[1:].tolist(), rel=1e-5)
    assert max(response.influence.scores) > 0 and response.influence.note == ""
    thinking = [(a + prompt, b + prompt) for a, b in response.key_focus.ranges]
    end = response.tokens.index("</think>") + 1 + prompt
    scores = key_focus_scores(model, ids, mask, [thinking], [end], key_focus_heads)[0]
    assert len(scores) == 5
    assert response.key_focus.scores == pytest.approx(scores.tolist(), rel=1e-5)
    with torch.no_grad():
        logits = model(ids).logits[0, prompt - 1 : -1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(response.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_entropy_of_certain_and_uniform_rows():
    logits = torch.zeros(300, 7)
    logits[::2, 3] = math.inf
    logits[::2] = logits[::2].where(logits[::2] > 0, -math.inf).clamp(max=50.0)
    entropies = token_entropies(logits)
    torch.testing.assert_close(entropies[::2], torch.zeros(150))
    torch.testing.assert_close(entropies[1::2], torch.full((150,), math.log(7)))
    assert token_entropies(torch.zeros(0, 7)).shape == (0,)


def test_responses_without_thinking_say_why(model, tiny_tokenizer, prompt_ids, key_focus_heads, delimiters):
    settings = InspectionSettings(key_focus_heads=key_focus_heads)
    one = inspect_response(model, tiny_tokenizer, prompt_ids, [20], settings, delimiters)
    assert "the thinking has no end" in one.key_focus.note and one.key_focus.scores == []
    assert "this response has 1 (" in one.influence.note and one.influence.scores == [0.0]
    assert one.waad.shape == (1,) and one.fai.isnan().all()
    no_heads = inspect_response(model, tiny_tokenizer, prompt_ids, [20, 21], InspectionSettings(), delimiters)
    assert "no key-focus heads" in no_heads.key_focus.note and "the thinking has no end" in no_heads.key_focus.note
    with pytest.raises(ValueError, match="completion_ids 0; give one or more"):
        inspect_response(model, tiny_tokenizer, prompt_ids, [], settings, delimiters)


def test_receiver_heads_have_the_highest_kurtosis(inspected):
    heads = find_receiver_heads(inspected, 0.25)
    profiles = [response.profiles[0] for response in inspected]
    mean = torch.stack([column_kurtosis(profile.fai) for profile in profiles]).mean(dim=0)  # (C,)
    assert heads == [profiles[0].heads[i] for i in mean.argsort(descending=True)[:3].tolist()]


def test_summaries_are_means_over_responses(inspected):
    receivers = find_receiver_heads(inspected)
    summaries = summarise_couplings(inspected, receivers)
    assert [(s.name, s.distance) for s in summaries] == [
        ("entropy", 0),
        ("receiver_global", 0),
        ("fai_after_waad", 0),
        ("receiver_global", 10),
        ("fai_after_waad", 10),
    ]
    for summary in summaries:
        both = [response_couplings(r, receivers, summary.distance)[summary.name] for r in inspected]
        assert summary.responses == 2
        assert summary.observed == pytest.approx((both[0].observed + both[1].observed) / 2)
        assert summary.random_sd == pytest.approx(abs(both[0].random - both[1].random) / math.sqrt(2))
        assert summary.lift == pytest.approx(summary.observed / summary.random - 1)
        assert all(0 < density < 0.5 for density in summary.densities.values())
