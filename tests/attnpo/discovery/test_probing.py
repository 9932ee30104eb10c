"""What a model is asked about steps, against direct computations."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from attn_trainers.attnpo.discovery import probing
from attn_trainers.attnpo.discovery.labels import (
    BY_LIKELIHOOD,
    ESSENTIAL,
    GIVEN,
    REDUNDANT,
    LabelledCompletion,
    LikelihoodThresholds,
)
from attn_trainers.attnpo.discovery.probing import (
    ProbedResponse,
    answer_logps,
    chunked_logps,
    label_steps,
    removal_drops,
    rows_at_once,
)


def direct_logp(model, ids: list[int], count: int) -> float:
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[-count - 1 + i, token].item() for i, token in enumerate(ids[-count:])) / count


@pytest.mark.parametrize("positions", [1, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_log_softmax_equals_the_whole(positions, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(2, 7, 50, generator=generator)).to(dtype)
    targets = torch.randint(50, (2, 7), generator=generator)
    whole = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(chunked_logps(logits, targets, positions), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_long_answers_take_fewer_rows_at_a_time(model, tokenizer, problems, candidate, prompt_ids, monkeypatch):
    vocabulary = model.get_output_embeddings().weight.shape[0]
    sequences = [prompt_ids(problems[0]) + candidate.completion_ids] * 5
    whole = answer_logps(model, sequences, 4, batch_size=5)
    monkeypatch.setattr(probing, "LOGITS_AT_ONCE", 2 * 5 * vocabulary)
    assert rows_at_once(model, 4, 5) == 2
    assert rows_at_once(model, 4, 1) == rows_at_once(model, 1000, 5) == 1
    widths = []
    model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert answer_logps(model, sequences, 4, batch_size=5) == pytest.approx(whole, abs=1e-5)
    assert widths == [2, 2, 1]


@torch.no_grad()
def test_answer_likelihood_and_drops_agree_with_single_forwards(model, tokenizer, problems, candidate, prompt_ids):
    prompt = prompt_ids(problems[0])
    sequences = [
        prompt + candidate.completion_ids,
        candidate.completion_ids[5:],
        prompt + candidate.completion_ids[9:],
    ]
    expected = [direct_logp(model, ids, 4) for ids in sequences]
    assert answer_logps(model, sequences, 4, batch_size=2) == pytest.approx(expected, abs=1e-4)

    # The first three of four steps: the last one is left out throughout.
    ids, ranges = candidate.completion_ids, candidate.alignment.step_ranges
    tail = ids[ranges[-1][1] :]
    assert tokenizer.decode(tail) == f"</think>\\boxed{{{problems[0].answer}}}<eos>"
    length = len(ids) - candidate.alignment.answer_start
    whole = direct_logp(model, prompt + ids[: ranges[2][1]] + tail, length)
    without = [direct_logp(model, prompt + ids[:s] + ids[e : ranges[2][1]] + tail, length) for s, e in ranges[:3]]
    drops = removal_drops(model, prompt, candidate, 3, batch_size=3)
    assert drops == pytest.approx([whole - one for one in without], abs=1e-4)


def test_repetitions_behind_the_answer_are_redundant(doubtful, problems, candidate, prompt_ids):
    model = Qwen2ForCausalLM.from_pretrained(doubtful)
    thresholds = LikelihoodThresholds(min_drop=0.3, max_change=0.02)
    labels, drops = label_steps(model, prompt_ids(problems[0]), candidate, batch_size=4, thresholds=thresholds)
    assert labels[3] == REDUNDANT and len(drops) == 3
    largest = max(range(3), key=lambda i: drops[i])
    assert [label == ESSENTIAL for label in labels] == [i == largest and drops[i] >= 0.3 for i in range(4)]
    assert [label == REDUNDANT for label in labels[:3]] == [drop <= 0.02 for drop in drops]
    # Where the problem gives the answer's value, no step derives it, and every step is probed.
    candidate.problem += f" {candidate.answer}"
    labels, drops = label_steps(model, prompt_ids(problems[0]), candidate, batch_size=4, thresholds=thresholds)
    assert len(drops) == 4


@pytest.mark.parametrize(
    ("source", "derivation", "expected"), [(BY_LIKELIHOOD, 1, 1), (BY_LIKELIHOOD, None, 2), (GIVEN, None, None)]
)
def test_steps_before_a_derivation_that_is_not_known(source, derivation, expected):
    ranges = [(0, 2), (2, 3)]
    response = LabelledCompletion(
        "p", "1", "", [5, 6, 7, 8], ranges, ["a", "b"], [ESSENTIAL, REDUNDANT], source, derivation
    )
    probed = ProbedResponse([1, 2, 3], 3, response, torch.zeros(4, 2))
    assert probed.scored_steps.derivation == expected
    assert probed.scored_steps.lengths.tolist() == [2, 1]
    assert (probed.ids, probed.step_ranges) == ([1, 2, 3, 5, 6, 7, 8], [(3, 5), (5, 6)])
