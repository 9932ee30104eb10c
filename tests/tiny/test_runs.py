"""What the recipes on the arithmetic task share."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from attn_trainers.base.generation import GenerationMixin
from attn_trainers.tiny.arithmetic import WarmStart, sample_problems
from attn_trainers.tiny.dependency_start import DependencyStart
from attn_trainers.tiny.runs import (
    TinyArguments,
    evaluate_held_out,
    exact_answer_reward,
    task_of,
    to_dataset,
)
from attn_trainers.tiny.truth import parse_problem


class Trainer(GenerationMixin, GRPOTrainer):
    pass


def test_held_out_samples_depend_on_their_seeds_alone(tiny_model_dir, tiny_tokenizer, tmp_path):
    problems = sample_problems(6, seed=1)
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 12}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none"}
    settings |= {"generation_kwargs": {"eos_token_id": 5}}  # a token that comes up: lengths differ between samples
    trainer = Trainer(
        str(tiny_model_dir),
        exact_answer_reward,
        GRPOConfig(str(tmp_path), **settings),
        train_dataset=to_dataset(problems),
        processing_class=tiny_tokenizer,
    )
    torch.manual_seed(0)
    first = evaluate_held_out(trainer, problems, 3)
    torch.manual_seed(1)
    assert evaluate_held_out(trainer, problems, 3) == first
    assert evaluate_held_out(trainer, problems, 3, seed=1).mean_length != first.mean_length
    assert (first.num_problems, first.num_samples, len(first.per_problem)) == (6, 3, 6)


def test_tasks_say_what_a_step_is_worth():
    chain, dependencies = task_of(TinyArguments()), task_of(TinyArguments(task="dependencies"))
    assert chain.settings == WarmStart() and dependencies.settings == DependencyStart()
    assert chain.needed(None, ["17 + 3 = 20", "Wait, let me check: 20 - 3 = 17"]) == [True, False]
    problem = parse_problem(" a1; b2; c a + b; d c + a; u a - b; d?")
    steps = [" c a1 + b2 = c3\n\n", " u a1 - b2 = u9\n\n", " d c3 + a1 = d4\n\n", "</think> c3 d4\\boxed{4}<eos>"]
    assert dependencies.needed(problem, steps[:3]) == [True, False, True]
    (example,) = to_dataset([problem])
    assert dependencies.step_truth(example, steps) == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="task='sums' is unknown"):
        task_of(TinyArguments(task="sums"))
