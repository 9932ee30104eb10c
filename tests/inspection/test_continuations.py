"""Forced tokens and greedy continuations of the small model, against one token at a time."""

import pytest
import torch

from attn_trainers.attention.heads import jaccard
from attn_trainers.inspection.continuations import (
    PerturbationSettings,
    continuations_of,
    continue_greedily,
    likeliest_others,
    perturb_response,
)
from attn_trainers.inspection.perturbation import content_words


COMPLETION = "17 + 3 = 20\n\n20 - 4 = 16\n\n16 + 9 = 25</think>\\boxed{25}"


@pytest.fixture(scope="module")
def completion_ids(tiny_tokenizer) -> list[int]:
    return tiny_tokenizer(COMPLETION)["input_ids"]


@torch.no_grad()
def greedy_by_hand(model, prefix: list[int], limit: int, end: int) -> list[int]:
    ids = list(prefix)
    for _ in range(limit):
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == end:
            break
        ids.append(token)
    return ids[len(prefix) :]


@torch.no_grad()
def others_by_hand(model, prompt_ids, completion_ids, position: int, count: int, end: int) -> list[int]:
    logits = model(input_ids=torch.tensor([prompt_ids + completion_ids[:position]])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    return [token for token in order if token not in (completion_ids[position], end)][:count]


def test_likeliest_others_leave_out_the_own_token_and_ends(model, prompt_ids, completion_ids):
    positions = [7, 0, 3]
    eager = [others_by_hand(model, prompt_ids, completion_ids, p, 4, end=-1) for p in positions]
    assert likeliest_others(model, prompt_ids, completion_ids, positions, 4) == eager
    end = eager[1][0]
    without = likeliest_others(model, prompt_ids, completion_ids, positions, 3, excluded=[end])
    assert without == [others_by_hand(model, prompt_ids, completion_ids, p, 3, end) for p in positions]
    assert end not in without[1]


def test_batched_continuations_are_those_of_one_token_at_a_time(model, tiny_tokenizer, prompt_ids, completion_ids):
    prefixes = [prompt_ids + completion_ids[:n] for n in (9, 2, 5, 1, 12)]
    limits = [6, 9, 1, 7, 3]
    free = [greedy_by_hand(model, prefix, limit, end=-1) for prefix, limit in zip(prefixes, limits, strict=True)]
    end = free[1][4]  # so that one ends before its limit
    expected = [greedy_by_hand(model, prefix, limit, end) for prefix, limit in zip(prefixes, limits, strict=True)]
    assert len(expected[1]) <= 4 and expected != free
    model.generation_config.repetition_penalty = 50.0  # as some models ask for
    configured = model.generation_config
    for batch_size in (1, 2, 16):
        assert continue_greedily(model, tiny_tokenizer, prefixes, limits, [end], batch_size) == expected
    assert model.generation_config is configured
    model.generation_config.repetition_penalty = None


def test_continuations_outrun_a_response_only_where_it_was_not_cut_off(
    model, tiny_tokenizer, prompt_ids, completion_ids
):
    forced = [(len(completion_ids) - 4, [20, 21]), (1, [22])]
    settings = PerturbationSettings(max_tokens=6)
    for cut_off, limits in ((False, (6, 6)), (True, (3, 6))):
        texts = continuations_of(
            model, tiny_tokenizer, prompt_ids, completion_ids, forced, settings, ends=[-1], cut_off=cut_off
        )
        by_hand = [
            [
                greedy_by_hand(model, [*prompt_ids, *completion_ids[:position], token], limit, end=-1)
                for token in tokens
            ]
            for (position, tokens), limit in zip(forced, limits, strict=True)
        ]
        assert texts == [[tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in rows] for rows in by_hand]


@pytest.mark.parametrize("cut_off", [False, True])
def test_perturbed_response_by_hand(model, tiny_tokenizer, prompt_ids, completion_ids, cut_off):
    end = tiny_tokenizer.eos_token_id
    ids = completion_ids + [end] * (not cut_off)
    fai = torch.linspace(0.0, 1.0, len(ids))  # the top positions are the last
    settings = PerturbationSettings(positions=2, candidates=3, max_tokens=8, batch_size=4)
    perturbed = perturb_response(model, tiny_tokenizer, prompt_ids, ids, fai, settings, [end], cut_off=cut_off)
    assert perturbed.num_tokens == len(ids)
    assert [p.top for p in perturbed.perturbations] == [True, True, False, False]
    last = (
        max(
            i for i, token in enumerate(ids) if content_words(tiny_tokenizer.decode([token], skip_special_tokens=True))
        )
        - 1
    )
    assert [p.position for p in perturbed.perturbations] == [last, last - 1, 0, 1]
    for perturbation in perturbed.perturbations:
        position = perturbation.position
        assert perturbation.fai == fai[position].item()
        assert perturbation.token == tiny_tokenizer.decode([ids[position]])
        tokens = others_by_hand(model, prompt_ids, ids, position, 3, end)
        assert perturbation.forced == [tiny_tokenizer.decode([token]) for token in tokens]
        own = content_words(tiny_tokenizer.decode(ids[position + 1 : position + 9], skip_special_tokens=True))
        limit = min(8, len(ids) - position - 1) if cut_off else 8
        for token, value in zip(tokens, perturbation.jaccards, strict=True):
            continued = greedy_by_hand(model, [*prompt_ids, *ids[:position], token], limit, end)
            assert value == jaccard(own, content_words(tiny_tokenizer.decode(continued, skip_special_tokens=True)))


def test_a_response_without_words_behind_is_not_perturbed(model, tiny_tokenizer, prompt_ids):
    end = tiny_tokenizer.eos_token_id
    ids = [*tiny_tokenizer("25")["input_ids"], end]
    perturbed = perturb_response(
        model, tiny_tokenizer, prompt_ids, ids, torch.rand(len(ids)), PerturbationSettings(), [end]
    )
    assert perturbed.perturbations == []
