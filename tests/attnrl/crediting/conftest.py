"""A trainer on trees with a credit method."""

from pathlib import Path

import pytest

from attn_trainers import AttnRLConfig
from tests.attnrl.crediting.helpers import WritingTrainer, odd_sum
from tests.helpers import LOOKED_AT


@pytest.fixture(scope="module")
def sharp_model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=64, num_layers=2)


@pytest.fixture
def make_trainer(tmp_path, sharp_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(credit=None, trainer_class=WritingTrainer, reward=odd_sum, **kwargs):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 6,
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_rollouts": 4,
            "rollouts_per_branch": 1,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "max_completion_length": 24,
            "min_branch_spacing": 0,
            "influence_delta": 1,
            **LOOKED_AT,
        }
        return trainer_class(
            str(sharp_model_dir),
            reward,
            AttnRLConfig(**(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            processing_class=tiny_tokenizer,
            credit=credit,
        )

    return make
