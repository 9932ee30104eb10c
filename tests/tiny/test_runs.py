"""What the recipes on the arithmetic task share."""

import torch
from trl import GRPOConfig, GRPOTrainer

from attn_trainers.base.generation import GenerationMixin
from attn_trainers.tiny.arithmetic import sample_problems
from attn_trainers.tiny.runs import evaluate_held_out, exact_answer_reward, to_dataset


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
