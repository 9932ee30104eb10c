"""Rounds of sampling from one model."""

from attn_trainers.sampling import session
from attn_trainers.sampling.backends import sample_completions
from attn_trainers.sampling.requests import GeneratedTokens, GenerationRequest, SamplingSettings
from attn_trainers.sampling.session import SamplingSession


def test_transformers_draws_what_a_single_call_draws(tiny_model_dir, tiny_tokenizer):
    settings = SamplingSettings(temperature=1.0, batch_size=2)
    requests = [GenerationRequest([5, 6, 7 + i], 6, seed=i) for i in range(3)]
    rounds = SamplingSession("transformers", str(tiny_model_dir), settings, tiny_tokenizer, 20)
    alone = dict(sample_completions("transformers", str(tiny_model_dir), settings, tiny_tokenizer, requests))
    assert dict(rounds.sample(requests)) == alone and len(alone) == 3
    assert list(rounds.sample([])) == []


def test_vllm_gets_one_engine_at_the_first_request(monkeypatch):
    built, seen = [], []
    monkeypatch.setattr(session, "engine_of", lambda model, settings, length: built.append(length) or "engine")

    def sample(model, settings, tokenizer, requests, llm):
        seen.append((llm, len(requests)))
        yield 0, GeneratedTokens([1])

    monkeypatch.setattr(session, "sample_with_vllm", sample)
    rounds = SamplingSession("vllm", "m", SamplingSettings(), None, 40)
    assert list(rounds.sample([])) == [] and built == []
    for count in (1, 2):
        assert list(rounds.sample([GenerationRequest([1], 4)] * count)) == [(0, GeneratedTokens([1]))]
    assert built == [40] and seen == [("engine", 1), ("engine", 2)]
