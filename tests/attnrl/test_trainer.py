"""The trainer on a small random model, with transformers generation; vLLM runs in test_vllm.py."""

import json

import pytest
import torch
from peft import LoraConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attention import forward_context_influence
from attn_trainers.attnrl.rollouts import branches_of
from attn_trainers.attnrl.steps import segment_steps
from attn_trainers.attnrl.trees import tree_paths
from tests.helpers import logged


def odd_sum(completions, completion_ids, **kwargs):
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def always_wrong(completions, **kwargs):
    return [0.0] * len(completions)


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
        self.losses.append((inputs, self.latest_logps, loss.item()))
        return loss


@pytest.fixture
def make_trainer(tmp_path, tiny_model_dir, tiny_tokenizer, arithmetic_dataset):
    def make(reward=odd_sum, trainer_class=RecordingTrainer, peft_config=None, eval_dataset=None, **kwargs):
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
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
        }
        return trainer_class(
            str(tiny_model_dir),
            reward,
            AttnRLConfig(**(settings | kwargs)),
            train_dataset=arithmetic_dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return make


def test_each_token_comes_from_the_policy_of_the_published_pipeline(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert len(trainer.batches) == 3
    for m, prompts in enumerate(trainer.batches, start=1):
        assert {r.policy for p in prompts for r in p.rollouts} == {max(0, m - 2)}
        assert {c.policy for p in prompts for c in p.continuations} == {m - 1}
    assert [p.draw.serial for prompts in trainer.batches for p in prompts] == list(
        range(trainer.pipeline.stream.next_serial)
    )
    assert trainer.pipeline.in_flight is None  # the last step samples nothing ahead


def test_the_synchronous_variant_samples_both_with_the_current_policy(make_trainer):
    trainer = make_trainer(off_policy=False)
    trainer.train()
    for m, prompts in enumerate(trainer.batches, start=1):
        policies = {r.policy for p in prompts for r in p.rollouts}
        policies |= {c.policy for p in prompts for c in p.continuations}
        assert policies == {m - 1}


def test_old_log_probs_are_stored_for_initial_tokens_and_fresh_for_continuations(make_trainer):
    trainer = make_trainer(max_steps=2, pack_trees="off")
    trainer.train()
    stored = {}
    for prompt in trainer.batches[0]:
        for path in tree_paths(prompt.trees()):
            rollout = prompt.rollouts[path.tree]
            kept = len(rollout.tokens) if path.leaf == 0 else branches_of(rollout)[path.leaf - 1].offset
            stored[tuple(prompt.prompt_ids), tuple(path.tokens)] = torch.from_numpy(rollout.old_logps[:kept])
    first_update = trainer.losses[:3]  # the policy has not moved since the continuations were sampled
    fresh_tokens = 0
    for inputs, logps, _ in first_update:
        for i in range(len(logps)):
            length = int(inputs["completion_mask"][i].sum())
            if length == 0:
                continue
            prompt = tuple(inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist())
            expected = stored[prompt, tuple(inputs["completion_ids"][i][:length].tolist())]
            old = inputs["old_per_token_logps"][i]
            assert torch.equal(old[: len(expected)], expected)
            fresh = inputs["fresh_mask"][i]
            assert fresh[:length].tolist() == [t >= len(expected) for t in range(length)]
            torch.testing.assert_close(logps[i][fresh], old[fresh], rtol=0, atol=0)
            fresh_tokens += int(fresh.sum())
    assert fresh_tokens > 0


def test_the_loss_is_the_dual_clipped_token_mean(make_trainer):
    trainer = make_trainer(beta=0.0, learning_rate=0.05, max_steps=2)
    trainer.train()
    num_tokens = sum(int(inputs["completion_mask"].sum()) for inputs, _, _ in trainer.losses)
    clipped = 0
    for inputs, logps, loss in trainer.losses:
        assert int(inputs["num_items_in_batch"]) == num_tokens
        mask, advantages = inputs["completion_mask"].bool(), inputs["advantages"]
        ratio = (logps - inputs["old_per_token_logps"]).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, 3.0 * advantages), surrogate)
        clipped += int(((ratio - 1).abs() > 0.28)[mask].sum())
        # Two updates share the generation batch's tokens, half of them each.
        assert loss == pytest.approx(-surrogate[mask].sum().item() / (num_tokens / 2), rel=1e-5, abs=1e-8)
    assert clipped > 0


def test_influence_and_old_log_probs_of_the_shared_forward_equal_those_of_separate_ones(make_trainer):
    trainer = make_trainer(max_steps=2)
    model = trainer.model
    prompts = trainer._sample([], trainer.pipeline.first_batch())
    for prompt in prompts:
        for rollout in prompt.rollouts:
            ids = torch.tensor([prompt.prompt_ids + rollout.tokens])
            segmentation = segment_steps(len(prompt.prompt_ids), rollout.tokens, trainer.delimiters)
            (influence,) = forward_context_influence(
                model, ids, torch.ones_like(ids), [segmentation.ranges], [segmentation.stop_step], delta=1
            )
            torch.testing.assert_close(torch.from_numpy(rollout.influence), influence[1:], rtol=1e-4, atol=1e-7)
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(
                torch.from_numpy(rollout.old_logps), logps[len(prompt.prompt_ids) - 1 :], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("branching", ["attention", "entropy", "random", "first_steps"])
def test_every_criterion_trains_with_the_whole_leaf_budget(make_trainer, branching):
    trainer = make_trainer(branching=branching, expansion="uniform", filter_easy_prompts=False, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    (prompts,) = trainer.batches
    assert {len(branches_of(r)) for p in prompts for r in p.rollouts if len(r.step_ranges) > 1} == {4}
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert logged(trainer, "attnrl/rows_trained")[0] + logged(trainer, "attnrl/rows_padded")[0] == 60


def test_without_branch_points_every_rollout_is_a_row_with_an_outcome_advantage(make_trainer):
    trainer = make_trainer(num_branch_points=0, max_steps=2)
    trainer.train()
    (prompts,) = trainer.batches
    assert len(prompts) == 10
    advantages = {}
    for prompt in prompts:
        mean = sum(r.reward for r in prompt.rollouts) / 6
        for r in prompt.rollouts:
            advantages[tuple(prompt.prompt_ids), tuple(r.tokens)] = 2 * (r.reward - mean)
    for inputs, _, _ in trainer.losses:
        for i, length in enumerate(inputs["completion_mask"].sum(1).tolist()):
            if length:
                prompt = tuple(inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist())
                key = prompt, tuple(inputs["completion_ids"][i][:length].tolist())
                assert inputs["advantages"][i][:length].tolist() == pytest.approx([advantages[key]] * length)


def test_a_batch_without_signal_leaves_the_model_and_goes_on(make_trainer):
    trainer = make_trainer(reward=always_wrong, beta=0.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert logged(trainer, "attnrl/rows_trained") == [0.0] * 3
    assert logged(trainer, "attnrl/rows_padded") == [60.0] * 3
    assert logged(trainer, "attnrl/solve_none_ratio") == [1.0] * 3
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.pipeline.controller.size > 2  # more prompts are drawn in search of signal


def test_completions_of_one_token_have_no_branches(make_trainer):
    trainer = make_trainer(max_completion_length=1, max_steps=2)
    trainer.train()
    (prompts,) = trainer.batches
    assert all(len(r.tokens) == 1 and not branches_of(r) for p in prompts for r in p.rollouts)
    assert logged(trainer, "attnrl/rows_trained") == [0.0]


def test_unscorable_completions_count_and_get_no_reward(make_trainer):
    def sometimes_none(completions, completion_ids, **kwargs):
        return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]

    trainer = make_trainer(reward=sometimes_none, max_steps=2)
    trainer.train()
    (prompts,) = trainer.batches
    samples = [r for p in prompts for r in p.rollouts] + [c for p in prompts for c in p.continuations]
    assert all(sample.reward in (0.0, 1.0) for sample in samples)
    assert logged(trainer, "attnrl/unscorable")[0] > 0


def test_metrics_of_reward_functions_arrive(make_trainer):
    def reward(completions, completion_ids, log_metric, log_extra, **kwargs):
        log_metric("tokens", float(len(completion_ids)))
        log_extra("length", [len(ids) for ids in completion_ids])
        return odd_sum(completions, completion_ids)

    trainer = make_trainer(reward=reward, max_steps=2, log_completions=True)
    trainer.train()
    (prompts,) = trainer.batches
    num_branches = sum(len(p.continuations) for p in prompts)
    # Two calls: the initial rollouts alone, then the continuations alone, as no batch follows.
    assert logged(trainer, "tokens") == [(6 * len(prompts) + num_branches) / 2]


def test_truncated_completions_are_masked_on_demand(make_trainer):
    trainer = make_trainer(
        mask_truncated_completions=True, max_completion_length=40, max_steps=2, num_rollouts=10, num_branch_points=0
    )
    trainer.train()
    eos = trainer.processing_class.eos_token_id
    masked = total = 0
    for inputs, _, _ in trainer.losses:
        for i, length in enumerate(inputs["completion_mask"].sum(1).tolist()):
            masked += length == 0
            total += length
            assert length == 0 or inputs["completion_ids"][i][length - 1] == eos
        num_items = int(inputs["num_items_in_batch"])
    assert masked > 0
    assert total == num_items


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_lora_trains_the_adapter_only(make_trainer, beta):
    trainer = make_trainer(peft_config=LoraConfig(r=4, target_modules="all-linear"), beta=beta, max_steps=4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert (len(logged(trainer, "kl")) > 0) == (beta > 0)


def test_a_resumed_run_goes_on_with_the_prompts_in_flight_and_the_controllers(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=4, max_steps=6)
    trainer.train()
    saved = json.loads((tmp_path / "out" / "checkpoint-4" / "attnrl_state.json").read_text())
    assert saved["batches_trained"] == 2
    first, count = saved["in_flight"]
    assert [p.draw.serial for p in trainer.batches[2]] == list(range(first, first + count))

    resumed = make_trainer(save_strategy="no", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    (prompts,) = resumed.batches
    assert [p.draw for p in prompts] == [p.draw for p in trainer.batches[2]]
    assert resumed.pipeline.batches_trained == 3
    assert resumed.pipeline.stream.next_serial == trainer.pipeline.stream.next_serial
    assert {r.policy for p in prompts for r in p.rollouts} == {2}  # sampled again by the policy of the checkpoint
    assert resumed.pipeline.easy_influence.count >= saved["easy_influence"]["count"]
    assert logged(resumed, "attnrl/samples")[-1] > saved["counters"]["samples"]


def test_evaluation_is_plain_generation(make_trainer, arithmetic_dataset):
    trainer = make_trainer(
        eval_dataset=arithmetic_dataset, eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=8
    )
    trainer.train()
    (reward,) = logged(trainer, "eval_reward")
    assert 0.0 <= reward <= 1.0
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("eval_attnrl")]


def test_settings_of_the_trainer_that_cannot_work_are_refused(
    make_trainer, arithmetic_dataset, tiny_model_dir, tmp_path
):
    args = AttnRLConfig(
        str(tmp_path), per_device_train_batch_size=30, save_strategy="no", use_cpu=True, bf16=False, report_to="none"
    )
    with pytest.raises(ValueError, match="tools is set"):
        AttnRLTrainer(str(tiny_model_dir), odd_sum, args, train_dataset=arithmetic_dataset, tools=[print])
    with pytest.raises(ValueError, match="train_dataset is an IterableDataset"):
        AttnRLTrainer(
            str(tiny_model_dir),
            odd_sum,
            args,
            train_dataset=arithmetic_dataset.to_iterable_dataset(),
        )
