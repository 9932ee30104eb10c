"""The arithmetic task: what the teacher writes, what the warm start trains on, and what it learns from."""

import random
import re
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_trainers.tiny.arithmetic import (
    MAX_VALUE,
    Problem,
    WarmStart,
    _batches,
    _solutions,
    build_model,
    sample_problems,
    warm_start,
    write_solution,
)
from attn_trainers.tiny.runs import exact_answer_reward


PROBLEM = Problem(17, (3, -4))
EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def test_solutions_of_a_teacher_that_never_errs():
    rng = random.Random(0)
    assert write_solution(PROBLEM, rng, noise=0.0) == "17 + 3 = 20\n\n20 - 4 = 16\n\n</think>\\boxed{16}"
    restated = write_solution(PROBLEM, rng, noise=0.0, restate=True)
    assert restated == "17 + 3 = 20\n\n20 - 4 = 16\n\n</think>17 + 3 = 20\n20 - 4 = 16\n\\boxed{16}"


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(10, 99))
def test_rechecks_invert_the_step_before_and_change_nothing_else(seed, num_operations, max_start):
    (problem,) = sample_problems(1, seed, num_operations, max_start)
    assert 10 <= problem.start <= max_start and all(1 <= abs(op) <= 9 for op in problem.operations)
    text = write_solution(problem, random.Random(seed), noise=0.3, recheck=0.5, restate=True)
    thinking, answer = text.split("</think>")
    steps, value = [], problem.start
    for paragraph in thinking.strip().split("\n\n"):
        left, sign, right, result = EQUATION.search(paragraph).groups()
        if paragraph.startswith("Wait"):
            assert (left, right, result) == (steps[-1][3], steps[-1][2], steps[-1][0])
            assert {sign, steps[-1][1]} == {"+", "-"}
        else:
            assert int(left) == value  # the chain goes on from what was written, right or wrong
            value = int(result)
            steps.append((left, sign, right, result))
    assert EQUATION.findall(answer) == steps and len(steps) == num_operations
    assert exact_answer_reward([text], [str(value)]) == [1.0]


def test_reward_wants_one_end_of_thinking_and_the_box_at_the_end():
    texts = [
        "a</think>\\boxed{5}",
        "\\boxed{5}",
        "a</think>b</think>\\boxed{5}",
        "a</think>\\boxed{5} so",
        "</think>5",
    ]
    assert exact_answer_reward(texts, ["5"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_batches_hold_every_solution_once_with_little_padding(tiny_tokenizer):
    settings = WarmStart(recheck=0.5, num_operations=3, steps=16, batch_size=8)
    batches = list(_batches(settings, tiny_tokenizer, exclude=set()))
    assert len(batches) == 16
    rows = [row[row != tiny_tokenizer.pad_token_id].tolist() for batch in batches for row in batch["input_ids"]]
    assert len({tuple(row) for row in rows}) == len(rows) == 128
    real = sum(map(len, rows))
    drawn = [len(ids) for ids, _ in islice(_solutions(settings, tiny_tokenizer, exclude=set()), 128)]
    in_order = sum(8 * max(drawn[i : i + 8]) for i in range(0, 128, 8))
    assert sum(drawn) == real
    assert sum(batch["input_ids"].numel() for batch in batches) - real < 0.4 * (in_order - real)
    for batch in batches:
        for ids, labels, mask in zip(*(batch[k] for k in ("input_ids", "labels", "attention_mask")), strict=True):
            text = tiny_tokenizer.decode(labels[labels >= 0])
            assert torch.equal(labels[labels >= 0], ids[mask.bool()][-(labels >= 0).sum() :])
            assert "<think>" not in text and text.endswith("}" + tiny_tokenizer.eos_token)


def test_numbers_start_alike_where_their_values_are_near(tiny_tokenizer):
    torch.manual_seed(0)
    model = build_model(tiny_tokenizer, hidden_size=64, num_layers=2)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.weight.detach()
        numbers = weight[tiny_tokenizer.convert_tokens_to_ids(["20", "21", "120"])]
        near, far = torch.cosine_similarity(numbers[:1], numbers[1:]).tolist()
        # Mean over the periods of cos(2π · distance / period).
        assert (near, far) == (pytest.approx(0.67, abs=0.01), pytest.approx(-0.05, abs=0.01))
        last = weight[tiny_tokenizer.convert_tokens_to_ids(str(MAX_VALUE))]
        assert last.norm() == pytest.approx(0.1 * 32**0.5, rel=1e-5)  # 32 cosines and sines, scaled


def test_warm_start_is_cached_and_leaves_the_global_generator_alone(tmp_path):
    settings = WarmStart(num_operations=1, steps=2, batch_size=4, hidden_size=64, num_layers=1)
    state = torch.get_rng_state()
    folder = warm_start(settings, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert warm_start(settings, tmp_path) == folder and weights.stat().st_mtime_ns == written
    assert warm_start(WarmStart(num_operations=1, steps=3, batch_size=4), tmp_path) != folder
