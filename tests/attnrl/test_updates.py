"""What the loop of updates relies on in `transformers` and TRL, and how it plans a run."""

import inspect

import pytest
from transformers import Trainer
from trl import GRPOTrainer


HOOKS = {
    (GRPOTrainer, "training_step"): ["self", "model", "inputs", "num_items_in_batch"],
    (GRPOTrainer, "get_high_entropy_mask"): ["self", "entropies", "mask", "threshold"],
    (Trainer, "set_initial_training_values"): ["self", "args", "dataloader"],
    (Trainer, "_maybe_log_save_evaluate"): [
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
}


@pytest.mark.parametrize(("owner", "name"), HOOKS)
def test_signature_of_a_hook(owner, name):
    assert list(inspect.signature(getattr(owner, name)).parameters) == HOOKS[owner, name]


def source(function):
    return " ".join(inspect.getsource(function).split())


def test_an_update_ends_with_the_step_in_which_gradients_are_exchanged():
    loop = source(Trainer._run_epoch)
    assert "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)" in loop
    assert "self.state.epoch = epoch + (step + 1) / steps_in_epoch" in loop
    assert "if self.control.should_epoch_stop or self.control.should_training_stop: break" in loop


def test_the_time_of_a_step_is_logged_after_its_last_micro_batch():
    step = source(GRPOTrainer.training_step)
    assert "self._step += 1" in step
    assert "if self._step % self.current_gradient_accumulation_steps == 0:" in step


def test_what_the_loss_divides_by():
    loss = source(GRPOTrainer._compute_loss)
    assert loss.count('normalizer = self.current_gradient_accumulation_steps if mode == "train" else 1.0') == 5
    assert 'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in loss
    assert "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation" in loss
    assert "loss = loss - apply_coef * entropy_loss" in loss
    assert "loss = loss + self.router_aux_loss_coef * aux_loss / normalizer" in loss


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "num_train_epochs": 1}, 24),  # 24 prompts, 2 a batch, 2 updates a batch
        ({"max_steps": -1, "num_train_epochs": 0.3}, 8),  # 8 prompts, 4 batches
        ({"max_steps": -1, "num_train_epochs": 1, "num_iterations": 2}, 48),
    ],
)
def test_the_schedule_is_laid_out_for_full_generation_batches(make_trainer, settings, updates):
    trainer = make_trainer(**settings)
    loader = trainer.get_train_dataloader()
    assert len(loader) == 3 * updates
    planned = trainer.set_initial_training_values(trainer.args, loader)
    assert planned[-1] == planned[1] == updates
