"""A RhythmTrainer on given completions: everything after the sampling is real, and what it made of a batch is kept."""

import math
import random
from pathlib import Path

import pytest
import torch


def given_completion(prompt_ids: list[int], row: int, group_size: int, lengths: tuple[int, int]) -> list[int]:
    """Random tokens, a function of the prompt and the row's place in its group alone; the last one may be no EOS."""
    rng = random.Random(f"{prompt_ids}/{row % group_size}")
    return [rng.randint(10, 200) for _ in range(rng.randint(*lengths))]


def even_tokens(completions, completion_ids, **kwargs) -> list[float]:
    """Reward: share of even token ids, cut to 0 or 1 at one half."""
    return [float(sum(i % 2 == 0 for i in ids) * 2 >= len(ids)) for ids in completion_ids]


@pytest.fixture(scope="session")
def key_case():
    """WAAD and FAI of a response of 20 tokens whose credit sets and rhythm were worked out by hand."""
    waad = [6, 3, 2, 1.5, 1, 7, 3, 2, 1, 1.2, 1, 5, 4, 2, 1.5, 1.1, 6.5, 2.5, 1.4, 1.3]
    fai = [0.05, 0.30, 0.04, 0.03, 0.02, 0.06, 0.40, 0.05, 0.04, 0.03, 0.02, 0.35, 0.07, 0.06, 0.05, 0.04, 0.03, 0.25]

    def make(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(waad, dtype=dtype), torch.tensor([*fai, math.nan, math.nan], dtype=dtype)

    return make


@pytest.fixture(scope="session")
def reward():
    return even_tokens


@pytest.fixture(scope="session")
def sharp_model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=128, num_layers=4)


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
    """Subclass of a trainer that is handed completions and keeps its generation batches and the steps of each."""

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
                self.sampled_at = [*getattr(self, "sampled_at", []), self.state.global_step]
                return output

        return Given

    return make
