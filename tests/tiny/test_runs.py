"""What the recipes on the arithmetic task share."""

import json

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from attn_trainers import AttnRLConfig, AttnRLTrainer, RhythmConfig, RhythmTrainer
from attn_trainers.base.generation import GenerationMixin
from attn_trainers.tiny.arithmetic import WarmStart, sample_problems
from attn_trainers.tiny.dependency_start import DependencyStart
from attn_trainers.tiny.runs import (
    HeldOutCurve,
    TinyArguments,
    evaluate_held_out,
    exact_answer_reward,
    task_of,
    to_dataset,
)
from attn_trainers.tiny.truth import parse_problem
from tests.helpers import odd_sum


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


SMALL = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_completion_length": 12}
TREES = {"num_rollouts": 2, "num_branch_points": 1, "rollouts_per_branch": 1, "min_branch_spacing": 0}
TREES |= {"filter_easy_prompts": False, "branching": "random", "generation_batch_size": 16, "disable_tqdm": True}


@pytest.mark.slow
@pytest.mark.parametrize("trees", [False, True])
def test_run_ends_at_its_budget_between_generation_batches(tiny_model_dir, tiny_tokenizer, tmp_path, trees):
    problems = sample_problems(24, seed=1)
    if trees:
        args = AttnRLConfig(str(tmp_path), per_device_train_batch_size=4, max_steps=500, **SMALL, **TREES)
        trainer_class = AttnRLTrainer
    else:
        groups = {"num_generations": 4, "steps_per_generation": 2, "scheme": "random", "disable_tqdm": True}
        args = RhythmConfig(str(tmp_path), per_device_train_batch_size=4, max_steps=500, **SMALL, **groups)
        trainer_class = RhythmTrainer
    trainer = trainer_class(
        str(tiny_model_dir), odd_sum, args, train_dataset=to_dataset(problems), processing_class=tiny_tokenizer
    )
    tiny = TinyArguments(num_eval_samples=2, max_generated_tokens=400, eval_every_tokens=150)
    curve = HeldOutCurve(trainer, tiny, problems[:3], tmp_path / "curve.jsonl")
    curve.measure()
    trainer.train()
    curve.measure()
    points = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    tokens = [point["generated_tokens"] for point in points]
    batch = 16 * 12 if trees else 8 * 12  # tokens of a generation batch at most; four times the prompts in a long one
    assert tokens[0] == 0 and tokens == sorted(tokens) and len(points) >= 3
    assert 400 <= tokens[-1] < 400 + 4 * batch and 150 <= tokens[1] <= tokens[-2] < 400
    assert trainer.is_between_generations() and points[-1]["updates"] == trainer.state.global_step < 500
    if trees:
        assert tokens[-1] == trainer.pipeline.totals["generated_tokens"]
    else:
        prompts = [len(trainer.processing_class(p.text + "<think>")["input_ids"]) for p in problems]
        assert len(set(prompts)) == 1  # TRL counts prompts too: so many rows of as many prompt tokens
        rows = points[-1]["updates"] * 4
        assert tokens[-1] == trainer.state.num_input_tokens_seen - rows * prompts[0]
        assert trainer.method_state()["generated_tokens"] == tokens[-1]
