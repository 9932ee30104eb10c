"""The credit interface: what a method gets if it defines nothing, and what the GRPO host does with its answers."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from attn_trainers.attention import RhythmObserver
from attn_trainers.base.config import MethodConfig
from attn_trainers.base.credit import (
    BatchCredit,
    CompletionBatch,
    CreditMethod,
    group_accuracies,
    weighted_rewards,
)
from attn_trainers.base.credit_trainer import CreditTrainer
from tests.helpers import LOOKED_AT, logged


NAN = float("nan")


class Halves(CreditMethod):
    """A factor on each completion's first half; keeps what the host told it."""

    prefix = "halves"

    def __init__(self, factor: float = 1.0, observes: bool = False):
        self.factor, self.observes = factor, observes
        self.seen, self.setups, self.reports, self.batches = [], [], [], 0

    def setup(self, model, tokenizer, reward_names, seed):
        self.setups.append((list(reward_names), seed))

    def observer(self, batch):
        return RhythmObserver(batch.attention_mask, batch.prompt_lengths, [0]) if self.observes else None

    def factors(self, passes, advantages, facts, context):
        self.seen.append((passes, advantages, facts, context))
        self.batches += 1
        factors = []
        for signal in passes:
            rows = torch.ones(len(signal.batch.input_ids), signal.batch.completion_width)
            for row, ids in zip(rows, signal.batch.completion_ids, strict=True):
                row[: len(ids) // 2] = self.factor
            factors.append(rows)
        tokens = sum(len(ids) for signal in passes for ids in signal.batch.completion_ids)
        return BatchCredit(factors, totals={"length": (tokens, len(facts[0].keys))}, values={"factor": self.factor})

    def report(self, credit, context):
        self.reports.append(credit)

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class LongerIsWorse(Halves):
    """Rewards shaped by length, advantages of its own."""

    def shape_rewards(self, rewards_per_func: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
        return rewards_per_func - lengths[:, None] / 100

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return rewards - 10.0 * groups


def some_right(completions, completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


@pytest.fixture
def make_trainer(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(trainer_class=CreditTrainer, config_class=MethodConfig, reward=some_right, **kwargs):
        class Recording(trainer_class):
            outputs = ()

            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                self.outputs = (*self.outputs, output)
                return output

        own = {"credit": kwargs.pop("credit")} if "credit" in kwargs else {}
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 12,
            "max_steps": 2,
            "learning_rate": 1e-3,
            **LOOKED_AT,
        }
        return Recording(
            str(tiny_model_dir),
            reward,
            config_class(**(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            processing_class=tiny_tokenizer,
            **own,
        )

    return make


def weights(trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# ---- the interface --------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_without_their_padding():
    batch = CompletionBatch.of(
        {
            "prompt_ids": torch.tensor([[0, 0, 7], [5, 6, 7], [0, 1, 2]]),
            "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
            "completion_ids": torch.tensor([[8, 9], [8, 0], [3, 4]]),
            "completion_mask": torch.tensor([[1, 1], [1, 0], [0, 0]]),
        }
    )
    assert batch.completion_width == 2 and batch.input_ids.shape == batch.attention_mask.shape == (3, 5)
    assert batch.prompt_lengths == [1, 3, 2]
    assert batch.prompt_ids == [[7], [5, 6, 7], [1, 2]]
    assert batch.completion_ids == [[8, 9], [8], []]  # the last one is masked out


def test_a_method_must_say_what_it_observes_and_which_factors_it_gives():
    with pytest.raises(TypeError, match="abstract method.*factors.*observer"):
        CreditMethod()


def test_what_a_method_that_defines_nothing_else_answers():
    method = Halves()
    rewards, weight = torch.tensor([[1.0, 0.0], [0.2, 0.9], [NAN, 1.0], [NAN, NAN]]), torch.tensor([1.0, 0.5])
    assert method.judge(rewards, weight).tolist() == pytest.approx([1, 1, 1, NAN], nan_ok=True)
    method.success_threshold = 0.7
    assert method.judge(rewards, weight).tolist() == pytest.approx([1, 0, 0, NAN], nan_ok=True)
    groups = torch.zeros(4, dtype=torch.long)
    assert method.shape_rewards(rewards, torch.ones(4), groups) is rewards
    assert method.advantages(rewards[:, 1], groups) is None
    assert method.reward_metrics(rewards[:, 0], torch.ones(4), groups) == method.settings() == {}


def test_weighted_rewards_leave_out_what_was_not_given():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    assert weighted_rewards(rewards, torch.tensor([1.0, 0.25])).tolist() == pytest.approx([1.5, 0.5, NAN], nan_ok=True)


def test_accuracy_of_a_prompt_counts_completions_that_could_be_judged():
    correct = torch.tensor([1.0, 0.0, NAN, 1.0, NAN, 1.0])
    groups = torch.tensor([7, 2, 7, 2, 9, 2])  # of any size, in any order
    assert group_accuracies(correct, groups).tolist() == pytest.approx([1.0, 2 / 3, 1.0, 2 / 3, 0.0, 2 / 3])
    assert group_accuracies(correct[:0], groups[:0]).tolist() == []


# ---- the GRPO host --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observes", [False, True], ids=["unobserved", "observed"])
def test_factors_of_one_are_grpo_to_the_bit(make_trainer, observes):
    parent = make_trainer(GRPOTrainer, GRPOConfig)
    parent.train()
    ours = make_trainer(credit=Halves(1.0, observes))
    ours.train()
    assert all((output["credit"] == 1).all() for output in ours.outputs) and len(ours.outputs) == 2
    assert logged(ours, "loss") == logged(parent, "loss")
    different = [name for name, p in weights(parent).items() if not torch.equal(p, weights(ours)[name])]
    assert different == []


def test_a_method_is_told_of_the_run_and_its_answers_are_logged(make_trainer):
    method = Halves(3.0, observes=True)
    trainer = make_trainer(credit=method, seed=5)
    trainer.train()
    assert method.setups == [(["some_right"], 5)]
    assert [context.step for *_, context in method.seen] == [0, 1]
    (signal,), (values,), (facts,), context = method.seen[0]
    output = trainer.outputs[0]
    assert torch.equal(values, output["advantages"][:, None])
    assert [profile.waad.shape[1] for profile in signal.observer.result()] == output["completion_mask"].sum(1).tolist()
    assert facts.keys == [str(row) for row in range(8)]
    correct = [float(sum(ids) % 2) for ids in signal.batch.completion_ids]
    assert facts.correct.tolist() == correct == context.rewards.tolist()
    means = [sum(correct[:4]) / 4] * 4 + [sum(correct[4:]) / 4] * 4
    assert facts.accuracies.tolist() == pytest.approx(means)
    assert context.max_steps == 2 and context.group_size == 4 and context.folder == Path(trainer.args.output_dir)
    for row, length in zip(output["credit"], output["completion_mask"].sum(dim=1).tolist(), strict=True):
        assert row.tolist() == [3.0] * (length // 2) + [1.0] * (len(row) - length // 2)
    lengths = [output["completion_mask"].sum().item() / 8 for output in trainer.outputs]
    assert logged(trainer, "halves/length") == pytest.approx(lengths)
    assert logged(trainer, "halves/factor") == [3.0, 3.0]
    assert method.reports[-1] is trainer.last_credit


def test_shaped_rewards_and_own_advantages_replace_the_hosts(make_trainer):
    trainer = make_trainer(credit=LongerIsWorse(), max_steps=1)
    trainer.train()
    (output,) = trainer.outputs
    ids, lengths = output["completion_ids"], output["completion_mask"].sum(dim=1)
    given = torch.tensor([float(row[:n].sum() % 2) for row, n in zip(ids, lengths.tolist(), strict=True)])
    shaped = given - lengths / 100
    torch.testing.assert_close(trainer.last_rewards_per_func[:, 0], shaped)
    groups = torch.tensor([0.0] * 4 + [1.0] * 4)
    torch.testing.assert_close(output["advantages"], shaped - 10 * groups)
    (_, _, (facts,), _) = trainer.credit.seen[0]
    assert facts.correct.tolist() == given.tolist()  # judged by what was given, not by what was made of it


def test_a_methods_state_lies_beside_the_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(credit=Halves(), save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.generated_tokens > 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    state = {"batches": 2, "generated_tokens": trainer.generated_tokens}
    assert json.loads((checkpoint / "credit_state.json").read_text()) == state
    resumed = make_trainer(credit=Halves(), max_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.credit.batches == 3
    assert resumed.generated_tokens > trainer.generated_tokens


def test_a_host_without_a_method_is_refused(make_trainer):
    with pytest.raises(ValueError, match="credit=None: give a credit method"):
        make_trainer()
