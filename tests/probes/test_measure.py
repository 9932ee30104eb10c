"""What is read of a rollout in one forward."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_trainers.attention import forward_context_influence
from attn_trainers.attnrl.exploration import CRITERIA, BranchPoints
from attn_trainers.attnrl.steps import StepDelimiters, segment_steps
from attn_trainers.probes.measure import RolloutSignals, points_of, read_rollout, sampling_entropies


def test_entropies_are_those_of_the_sampling_distribution():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]])
    assert sampling_entropies(logits, 0.5)[0].item() == pytest.approx(math.log(4))
    p = 9 / 10  # at half the temperature 3 : 1 becomes 9 : 1
    assert sampling_entropies(logits, 0.5)[1].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_one_forward_gives_influence_and_entropies(tiny_model_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    delimiters = StepDelimiters.from_tokenizer(tiny_tokenizer)
    prompt = tiny_tokenizer("17 + 3<think>")["input_ids"]
    completion = tiny_tokenizer("\n\n".join(["17 + 3 = 20"] * 5))["input_ids"]
    read = read_rollout(model, prompt, completion, delimiters, delta=1, temperature=0.8)
    ids = torch.tensor([prompt + completion])
    segmentation = segment_steps(len(prompt), completion, delimiters)
    (influence,) = forward_context_influence(model, ids, torch.ones_like(ids), [segmentation.ranges], delta=1)
    assert read.influence == influence[1:].tolist() and max(read.influence) > 0
    assert read.step_ranges[0][0] == 0 and read.step_ranges[-1][1] == len(completion) and len(read.step_ranges) == 5
    with torch.no_grad():
        logps = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
    assert read.entropies == pytest.approx((-(logps.exp() * logps).sum(-1)).tolist(), rel=1e-5)


def test_each_criterion_gets_what_it_needs():
    ranges = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    signals = RolloutSignals(ranges, [0.0, 0.1, 0.2, 0.9, 0.0], [float(t == 7) for t in range(20)])
    options = {"num_points": 1, "top_fraction": 0.2, "min_spacing": 0, "seed": 5}
    assert points_of("attention", signals, **options) == BranchPoints([12])
    assert points_of("entropy", signals, **options) == BranchPoints([7])
    assert points_of("first_steps", signals, **options) == BranchPoints([4])
    drawn = {points_of("random", signals, **options | {"seed": seed}).offsets[0] for seed in range(40)}
    assert drawn == {4, 8, 12, 16}
    assert {"attention", "entropy", "first_steps", "random"} <= set(CRITERIA)
