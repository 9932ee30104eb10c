"""Batched generation with limits and seeds, on distributions that are known."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.sampling.requests import GenerationRequest, SamplingSettings
from attn_trainers.sampling.transformers import (
    SeededSampling,
    generate_batch,
    sample_with_transformers,
    seeded_config,
)
from attn_trainers.tiny.byte_model import build_byte_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(build_byte_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def config_of(**settings):
    return GenerationConfig(do_sample=True, eos_token_id=[257], pad_token_id=258, **({"top_k": 0} | settings))


def test_seeded_sampling_draws_from_the_softmax_and_each_row_alone():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    draws = 20_000
    picks = SeededSampling(range(draws), "cpu")(None, scores.expand(draws, 3)).argmax(dim=1).tolist()
    for token, p in enumerate(scores.softmax(dim=1)[0].tolist()):
        assert abs(Counter(picks)[token] / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)  # four standard errors
    alone = SeededSampling([7], "cpu")(None, scores)
    together = SeededSampling([3, 7], "cpu")(None, scores.expand(2, 3))
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize(
    ("settings", "probabilities"),
    [
        ({"temperature": 0.5}, [16, 4, 1]),
        ({"top_k": 2}, [4, 2, 0]),
        ({"top_p": 0.8}, [4, 2, 0]),
        ({"min_p": 0.4}, [4, 2, 0]),
        ({"temperature": 0.5, "min_p": 0.1}, [16, 4, 0]),
    ],
)
def test_settings_shape_what_seeds_draw_from(settings, probabilities):
    # Probabilities 4 : 2 : 1. Temperature 1/2 squares them; 4/7 and 2/7 make up more than 0.8; 1/4 is below 0.4.
    scores = torch.tensor([[4.0, 2.0, 1.0]]).log()
    draws = 4_000
    requests = [GenerationRequest([1], 1, seed) for seed in range(draws)]
    config, processors = seeded_config(config_of(**settings), requests, "cpu")
    assert config.do_sample is False
    picks = Counter(processors(None, scores.expand(draws, 3)).argmax(dim=1).tolist())
    for token, weight in enumerate(probabilities):
        p = weight / sum(probabilities)
        assert abs(picks[token] / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)


def test_a_seeded_sample_is_the_same_in_any_batch(model):
    prompts = [[20 + i] * (1 + 2 * i) for i in range(5)]
    requests = [GenerationRequest(ids, 4 + i, seed=100 + i) for i, ids in enumerate(prompts)]
    together = generate_batch(model, requests, config_of(temperature=0.9, top_p=0.95), "cpu")
    torch.manual_seed(1)
    alone = [generate_batch(model, [r], config_of(temperature=0.9, top_p=0.95), "cpu")[0] for r in requests]
    assert together == alone
    assert [len(ids) for ids in together] == [4, 5, 6, 7, 8]
    others = [GenerationRequest(r.prompt_ids, r.max_tokens, r.seed + 1) for r in requests]
    assert generate_batch(model, others, config_of(temperature=0.9, top_p=0.95), "cpu") != together


def test_a_row_without_a_seed_follows_the_global_generator_and_leaves_the_seeded_alone(model):
    requests = [GenerationRequest([20, 21], 8, seed=3), GenerationRequest([20, 21], 8)]
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate_batch(model, requests, config_of(), "cpu"))
    assert drawn[0] == drawn[1] and drawn[0][0] == drawn[2][0] and drawn[0][1] != drawn[2][1]


def test_without_seeds_generate_samples_as_it_does(model):
    requests = [GenerationRequest([20, 21], 8), GenerationRequest([30], 3)]
    config = config_of(temperature=0.8)
    assert seeded_config(config, requests, "cpu") == (config, [])
    torch.manual_seed(4)
    drawn = generate_batch(model, requests, config, "cpu")
    torch.manual_seed(4)
    plain = model.generate(
        input_ids=torch.tensor([[20, 21], [258, 30]]),
        attention_mask=torch.tensor([[1, 1], [0, 1]]),
        generation_config=GenerationConfig(**(config.to_diff_dict() | {"max_new_tokens": 8})),
    )[:, 2:].tolist()
    assert drawn == [plain[0], plain[1][:3]]


def test_the_completion_ends_with_the_end_token_that_the_config_names(model):
    request = [GenerationRequest([20], 6, seed=0)]
    free = generate_batch(model, request, config_of(), "cpu")[0]
    for end in (free[2], [free[2], 300]):
        ended = GenerationConfig(do_sample=True, top_k=0, eos_token_id=end, pad_token_id=258)
        assert generate_batch(model, request, ended, "cpu") == [free[: free.index(free[2]) + 1]]
    endless = GenerationConfig(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=258)
    stub = SimpleNamespace(
        generate=lambda input_ids, **kwargs: torch.cat([input_ids, torch.tensor([[257, 5]])], dim=1)
    )
    assert generate_batch(stub, request, endless, "cpu") == [[257, 5]]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"eta_cutoff": 0.1}, {"top_h": 0.4}])
def test_settings_that_know_no_seeds_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"generation_kwargs=\{{'{name}': .* cannot go with seeds; leave {name} out"):
        seeded_config(config_of(**settings), [GenerationRequest([1], 1, 0)], "cpu")


def test_samples_come_with_the_index_of_their_request_whatever_the_batch_size(folder, caplog):
    tokenizer = load_tokenizer(folder)
    requests = [GenerationRequest([20 + i], 3 + i, seed=i) for i in range(5)]
    runs = []
    for size in (2, 5):
        settings = SamplingSettings(temperature=1.0, batch_size=size)
        runs.append({i: s.token_ids for i, s in sample_with_transformers(folder, settings, tokenizer, requests)})
    assert runs[0] == runs[1]
    assert [len(runs[0][i]) for i in range(5)] == [3, 4, 5, 6, 7]
    assert caplog.messages == []  # nothing of settings that would be ignored
