"""Requests and what is counted and cut of them."""

import subprocess
import sys

import pytest

from attn_trainers.sampling.requests import (
    GeneratedTokens,
    GenerationRequest,
    count_missing_logps,
    cut_completion,
    fit_positions,
)
from tests.helpers import ROOT


def test_sampling_imports_neither_trl_nor_vllm(environment):
    modules = ", ".join(
        f"attn_trainers.sampling.{name}"
        for name in ("requests", "models", "problems", "vllm", "transformers", "backends")
    )
    code = f"import sys, {modules}; print([m for m in ('trl', 'vllm') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [([5, 6, 1, 7], 10, [5, 6, 1]), ([5, 6, 7], 2, [5, 6]), ([1, 1], 5, [1]), ([5, 6, 1], 3, [5, 6, 1]), ([], 3, [])],
)
def test_a_completion_ends_with_its_first_eos_or_at_its_limit(tokens, limit, expected):
    assert cut_completion(tokens, limit, eos_token_ids=[1, 2]) == expected


def test_missing_log_probs_are_counted():
    completions = [GeneratedTokens([1, 2], [float("nan"), -1.0]), GeneratedTokens([3], None)]
    assert count_missing_logps(completions) == 1


def test_limits_are_cut_to_what_the_positions_leave():
    requests = [GenerationRequest([0] * n, 6, seed=n) for n in (3, 4, 5, 9)]
    fitting, num_cut = fit_positions(requests, 10)
    assert [request.max_tokens for request in fitting] == [6, 6, 5, 1]
    assert [(r.prompt_ids, r.seed) for r in fitting] == [(r.prompt_ids, r.seed) for r in requests]
    assert num_cut == 2
    assert fit_positions(requests, None) == (requests, 0)
    with pytest.raises(ValueError, match="a prompt of 9 tokens fills the 9 positions"):
        fit_positions(requests, 9)
