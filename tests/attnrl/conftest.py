"""AttnRL's trainer on a small random model."""

import pytest

from attn_trainers import AttnRLConfig, AttnRLTrainer
from tests.helpers import LOOKED_AT, odd_sum


class RecordingTrainer(AttnRLTrainer):
    """Keeps what passed through the pipeline."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []
        self.losses = []

    def _training_micro_batches(self, prompts, num_drawn):
        self.batches.append(prompts)
        return super()._training_micro_batches(prompts, num_drawn)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.latest_logps = output[0].detach()
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self.losses.append((inputs | {"update": self.state.global_step}, self.latest_logps, loss.item()))
        return loss


@pytest.fixture
def make_trainer(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(
        reward=odd_sum, trainer_class=RecordingTrainer, peft_config=None, eval_dataset=None, step_truth=None, **kwargs
    ):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 10,
            "steps_per_generation": 6,
            "gradient_accumulation_steps": 3,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "max_completion_length": 12,
            "min_branch_spacing": 0,
            "influence_delta": 1,
            **LOOKED_AT,
        }
        return trainer_class(
            str(tiny_model_dir),
            reward,
            AttnRLConfig(**(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
            step_truth=step_truth,
        )

    return make
