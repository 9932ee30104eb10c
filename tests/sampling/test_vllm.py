"""What is made for a vLLM engine, and read from it."""

from types import SimpleNamespace

import pytest

from attn_trainers.sampling.requests import GenerationRequest
from attn_trainers.sampling.vllm import engine_calls, sampled_logps, sampling_params


def test_the_sampled_tokens_log_prob_is_found_by_its_id_not_its_rank():
    def entry(logprob, rank):
        return SimpleNamespace(logprob=logprob, rank=rank)

    output = SimpleNamespace(
        token_ids=[7, 3], logprobs=[{9: entry(-0.1, 1), 7: entry(-2.5, 4)}, {3: entry(-0.2, 1), 8: entry(-1.9, 2)}]
    )
    assert sampled_logps(output) == [-2.5, -0.2]


@pytest.mark.parametrize(
    ("on_cpu", "seed", "expected"),
    [
        (False, 1, [[0, 1, 2, 3, 4]]),
        (True, None, [[0, 1, 2, 3, 4]]),
        (True, 1, [[0, 1], [2], [3], [4]]),
    ],
)
def test_only_seeded_requests_on_a_cpu_are_spread_over_calls(on_cpu, seed, expected):
    scheduler = SimpleNamespace(max_num_batched_tokens=100, max_num_seqs=10)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=scheduler)))
    requests = [GenerationRequest([0] * n, 5, seed) for n in (40, 40, 30, 100, 10)]
    assert engine_calls(llm, requests, on_cpu) == expected


def test_limit_and_seed_are_the_requests_own():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = {"temperature": 0.5, "max_tokens": 99, "seed": 3}
    params = sampling_params(settings, GenerationRequest([1], max_tokens=7, seed=11))
    assert (params.temperature, params.max_tokens, params.seed) == (0.5, 7, 11)
    assert sampling_params(settings, GenerationRequest([1], max_tokens=7)).seed is None
    assert settings == {"temperature": 0.5, "max_tokens": 99, "seed": 3}
