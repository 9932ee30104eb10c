"""The loop of updates: what it relies on, how it plans a run, where batches, passes and saves fall."""

import inspect
import itertools
import json

import pytest
import torch
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attnrl.pipeline import Pipeline
from tests.helpers import always_wrong, logged, odd_sum


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


def test_batches_without_rows_are_no_updates_and_the_next_is_sampled_at_once(make_trainer):
    calls = []

    def wrong_at_first(completions, completion_ids, **kwargs):
        calls.append(len(completions))
        return odd_sum(completions, completion_ids) if len(calls) > 3 else always_wrong(completions)

    trainer = make_trainer(reward=wrong_at_first, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.pipeline.empty_batches == 2
    assert logged(trainer, "attnrl/empty_batches")[0] == pytest.approx(1.0)  # mean of 0, 1 and 2: one entry of the log
    assert trainer.pipeline.batches_trained == len(trainer.batches) - 2
    assert trainer.pipeline.controller.state_dict()["exact_size"] > 2.4  # more prompts are drawn in search of signal
    assert {r.policy for p in trainer.batches[2] for r in p.rollouts} == {0}


def test_a_run_without_any_row_goes_on_and_tells_the_likely_causes(make_trainer, caplog):
    trainer = make_trainer(reward=always_wrong, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with caplog.at_level("WARNING", logger="attn_trainers.attnrl.updates"):
        trainer.train()
    assert caplog.text.count("5 generation batches in a row gave no row to train on") == 2
    assert trainer.pipeline.empty_batches == 10
    assert trainer.pipeline.batches_trained == 0 and trainer.state.global_step == 2
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]  # steps that were let go by
    for entry in (first, second):
        assert entry["attnrl/solve_none_ratio"] == 1.0
        assert entry["attnrl/rows_trained"] == entry["grad_norm"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_save_waits_for_the_end_of_its_generation_batch_and_a_resumed_run_goes_on_from_there(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=8)
    trainer.train()
    ends = list(itertools.accumulate(int(n) for n in logged(trainer, "attnrl/updates")))
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == [min(end, 8) for end in ends]
    assert 1 not in saved  # a save was due there
    m = 2  # batches before the checkpoint
    checkpoint = tmp_path / "out" / f"checkpoint-{ends[m - 1]}"
    state = json.loads((checkpoint / "attnrl_state.json").read_text())
    assert state["batches_trained"] == m
    first, count = state["in_flight"]
    assert [p.draw.serial for p in trainer.batches[m]] == list(range(first, first + count))

    resumed = make_trainer(save_strategy="no", max_steps=8)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    prompts = resumed.batches[0]
    assert [p.draw for p in prompts] == [p.draw for p in trainer.batches[m]]
    assert {r.policy for p in prompts for r in p.rollouts} == {m}  # sampled again by the policy of the checkpoint
    assert resumed.state.global_step == 8
    assert resumed.pipeline.easy_influence.count >= state["easy_influence"]["count"]
    # What was in flight at the checkpoint counts once.
    used = [leaf for batch in (*trainer.batches[:m], *resumed.batches) for p in batch for leaf in p.leaves]
    assert resumed.pipeline.totals["samples"] == len(used)
    counters = resumed.pipeline.totals
    assert resumed.state.num_input_tokens_seen == counters["generated_tokens"] + counters["context_tokens"]


def test_a_synchronous_run_resumes_to_the_bit(make_trainer, tmp_path):
    settings = {"off_policy": False, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = make_trainer(**settings)
    whole.train()
    checkpoint = min((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = make_trainer(**(settings | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(resumed.batches) < len(whole.batches)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


@pytest.mark.parametrize("epochs", [1, 2])
def test_num_train_epochs_are_passes_over_the_prompts(make_trainer, tmp_path, epochs):
    trainer = make_trainer(max_steps=-1, num_train_epochs=epochs, save_strategy="epoch")
    trainer.train_dataset = trainer.train_dataset.select(range(5))
    trainer.pipeline = Pipeline(trainer.args, 5)
    trainer.train()
    serials = [p.draw.serial for prompts in trainer.batches for p in prompts]
    assert serials == list(range(5 * epochs))
    assert sorted(p.draw.index for prompts in trainer.batches for p in prompts) == sorted([*range(5)] * epochs)
    assert trainer.state.epoch == epochs
    assert trainer.state.global_step == sum(logged(trainer, "attnrl/updates")) <= trainer.state.max_steps
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == epochs


def test_a_data_set_smaller_than_a_prompt_batch_is_drawn_from_again(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=30, max_steps=1)  # 6 prompts a batch
    trainer.train_dataset = trainer.train_dataset.select(range(4))
    trainer.pipeline = Pipeline(trainer.args, 4)
    trainer.train()
    (prompts,) = trainer.batches
    assert [p.draw.serial for p in prompts] == list(range(6))
    assert sorted(p.draw.index for p in prompts[:4]) == list(range(4))


def test_the_default_config_constructs_and_trains(
    tmp_path, monkeypatch, tiny_model_dir, tiny_tokenizer, arithmetic_dataset
):
    monkeypatch.chdir(tmp_path)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 12, "max_steps": 1}
    args = AttnRLConfig(str(tmp_path / "out"), min_branch_spacing=0, influence_delta=1, **settings)
    assert (args.per_device_train_batch_size, args.generation_batch_size) == (8, 120)
    # In the order of the parent's arguments.
    trainer = AttnRLTrainer(str(tiny_model_dir), odd_sum, args, arithmetic_dataset, None, tiny_tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1
    (entry,) = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert 0.0 < entry["rewards/odd_sum/mean"] < 1.0  # TRL's defaults log every tenth step: this is the only entry


@pytest.mark.parametrize("budget", [60, 200])
def test_a_budget_of_tokens_trains_on_the_same_rows(make_trainer, budget):
    by_rows, by_tokens = (make_trainer(max_tokens_per_micro_batch=b, max_steps=1) for b in (None, budget))
    for trainer in (by_rows, by_tokens):
        torch.manual_seed(0)
        trainer.train()
    assert logged(by_rows, "attnrl/micro_batches") != logged(by_tokens, "attnrl/micro_batches")
    assert logged(by_rows, "attnrl/rows_trained") == logged(by_tokens, "attnrl/rows_trained")
    assert logged(by_rows, "loss")[0] == pytest.approx(logged(by_tokens, "loss")[0], rel=1e-4, abs=1e-6)
    assert logged(by_rows, "grad_norm")[0] == pytest.approx(logged(by_tokens, "grad_norm")[0], rel=1e-3)
    for inputs, _, _ in by_tokens.losses:
        kept = int(inputs["completion_mask"].sum() + inputs["prompt_mask"].sum())
        assert kept > 0
    for name, parameter in by_rows.model.named_parameters():
        torch.testing.assert_close(by_tokens.model.get_parameter(name), parameter, rtol=1e-2, atol=2e-3)


def test_updates_need_not_divide_a_generation_batch(make_trainer):
    # 80 rows at most, 30 an update: three updates, the last of which may be smaller.
    trainer = make_trainer(
        num_rollouts=4, num_branch_points=2, steps_per_generation=8, expansion="uniform", max_steps=3
    )
    trainer.train()
    rows, updates = logged(trainer, "attnrl/rows_trained")[0], logged(trainer, "attnrl/updates")[0]
    assert updates == -(-rows // 30)


def test_the_best_model_is_saved_between_generation_batches(make_trainer, arithmetic_dataset, tmp_path):
    trainer = make_trainer(
        eval_dataset=arithmetic_dataset.select(range(8)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_reward",
        per_device_eval_batch_size=8,
        max_steps=5,
    )
    trainer.train()
    ends = set(itertools.accumulate(int(n) for n in logged(trainer, "attnrl/updates")))
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")}
    assert saved and saved <= ends | {5}
    assert trainer.state.best_global_step in saved


def test_a_batch_is_trained_on_as_often_as_num_iterations_says(make_trainer):
    trainer = make_trainer(num_iterations=2, max_steps=4, learning_rate=1e-2)
    trainer.train()
    first = [inputs["completion_ids"] for inputs, _, _ in trainer.losses]
    updates = int(logged(trainer, "attnrl/updates")[0])
    micro_batches = int(logged(trainer, "attnrl/micro_batches")[0])
    assert updates == 2 and len(first) >= 2 * micro_batches
    for once, again in zip(first[:micro_batches], first[micro_batches : 2 * micro_batches], strict=True):
        assert torch.equal(once, again)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_stop_inside_a_batch_saves_and_drops_the_rest_of_it(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=8)
    trainer.add_callback(StopAt(1))
    trainer.train()
    assert logged(trainer, "attnrl/updates") == [2.0]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    trainer.remove_callback(StopAt)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert trainer.state.global_step == 8
    first, second = ([p.draw.serial for p in prompts] for prompts in trainer.batches[:2])
    assert second[0] == first[-1] + 1  # the next prompts, not the same again
