"""A RhythmTrainer on given completions: everything after the sampling is real, and what it made of a batch is kept."""

import random
from pathlib import Path

import pytest
import torch

from attn_trainers.arithmetic import build_model


def given_completion(prompt_ids: list[int], row: int, group_size: int, lengths: tuple[int, int]) -> list[int]:
    """Random tokens, a function of the prompt and the row's place in its group alone; the last one may be no EOS."""
    rng = random.Random(f"{prompt_ids}/{row % group_size}")
    return [rng.randint(10, 200) for _ in range(rng.randint(*lengths))]


def even_tokens(completions, completion_ids, **kwargs) -> list[float]:
    """Reward: share of even token ids, cut to 0 or 1 at one half."""
    return [float(sum(i % 2 == 0 for i in ids) * 2 >= len(ids)) for ids in completion_ids]


@pytest.fixture(scope="session")
def reward():
    return even_tokens


@pytest.fixture(scope="session")
def sharp_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Qwen2 of 4 layers whose attention differs between tokens and heads."""
    folder = tmp_path_factory.mktemp("sharp-model")
    torch.manual_seed(0)
    model = build_model(tiny_tokenizer, hidden_size=128, num_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12.0)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 40,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


@pytest.fixture
def with_given():
    """Subclass of a trainer whose sampling hands out given completions and which keeps its training batches."""

    def make(trainer_class: type, lengths: tuple[int, int] = (12, 40)) -> type:
        class Given(trainer_class):
            def _generate_single_turn(self, prompt_ids, *args, **kwargs):
                first = self.accelerator.process_index * len(prompt_ids)
                group = self.num_generations
                rows = enumerate(prompt_ids, start=first)
                return [given_completion(ids, row, group, lengths) for row, ids in rows], None

            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                self.outputs = [*getattr(self, "outputs", []), output]
                return output

        return Given

    return make
