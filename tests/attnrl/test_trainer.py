"""The trainer on a small random model, with transformers generation; vLLM runs in test_vllm.py."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attention import forward_context_influence
from attn_trainers.attnpo.rewards import get_length_penalised_accuracy_reward
from attn_trainers.attnrl.rollouts import branches_of
from attn_trainers.attnrl.steps import segment_steps
from attn_trainers.attnrl.trees import tree_paths
from attn_trainers.sampling.requests import GenerationRequest
from tests.helpers import logged, odd_sum


def test_each_token_comes_from_the_policy_of_the_published_pipeline(make_trainer):
    trainer = make_trainer(max_steps=8)
    trainer.train()
    updates = [int(n) for n in logged(trainer, "attnrl/updates")]
    assert len(trainer.batches) == len(updates) >= 4
    steps_before = steps = 0
    for m, (prompts, count) in enumerate(zip(trainer.batches, updates, strict=True), start=1):
        # A batch that may have been the last, with two updates, sampled nothing ahead: then the next starts anew.
        was_ahead = m > 1 and steps_before + 2 < 8
        assert {r.policy for p in prompts for r in p.rollouts} == {m - 2 if was_ahead else m - 1}
        assert {c.policy for p in prompts for c in p.continuations} == {m - 1}
        steps_before, steps = steps, steps + count
    assert steps_before < 8 <= steps
    assert [p.draw.serial for prompts in trainer.batches for p in prompts] == list(
        range(trainer.pipeline.stream.next_serial)
    )
    assert trainer.pipeline.in_flight is None  # the last batch samples nothing ahead


def test_a_response_template_parses_completions_as_in_trl(make_trainer, tiny_tokenizer, monkeypatch):
    """A continuation's completion is the whole leaf, parsed behind its prompt."""
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<think>",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"(?=[\s\S]*?</think>)",
                "close_pattern": "</think>",
                "content": "text",
            },
            "content": {"close_pattern": "<eos>|$", "content": "text"},
        },
    }
    monkeypatch.setattr(tiny_tokenizer, "response_template", template)
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(seen) % 2)] * len(completions)

    trainer = make_trainer(reward, max_steps=2)
    prompt = [{"role": "user", "content": "1 + 2"}]
    prompt_ids = tiny_tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    texts = ["1 + 2 = 3\n\n</think>\\boxed{3}<eos>", "1 + 2 = 3\n\n"]
    ids = [tiny_tokenizer(text)["input_ids"] for text in texts]
    closed, cut_off = trainer._as_completions(prompt, [prompt_ids] * 2, ids)
    assert closed == [{"role": "assistant", "reasoning_content": "1 + 2 = 3", "content": "\\boxed{3}"}]
    assert cut_off == [{"role": "assistant", "content": "1 + 2 = 3"}]
    trainer.train()
    assert seen and all(message.keys() <= closed[0].keys() for (message,) in seen)


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
    first_update = by_update(trainer)[0]  # the policy has not moved since the continuations were sampled
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


def by_update(trainer):
    """Recorded losses of each update; micro-batches of one come one after the other."""
    updates = []
    for entry in trainer.losses:
        if not updates or entry[0]["update"] != updates[-1][0][0]["update"]:
            updates.append([])
        updates[-1].append(entry)
    return updates


def test_the_loss_is_the_dual_clipped_mean_over_the_tokens_of_the_update(make_trainer):
    trainer = make_trainer(beta=0.0, learning_rate=0.05, max_steps=2)
    trainer.train()
    clipped = 0
    updates = by_update(trainer)
    assert len(updates) == 2
    for update in updates:
        num_tokens = sum(int(inputs["completion_mask"].sum()) for inputs, _, _ in update)
        for inputs, logps, loss in update:
            mask, advantages = inputs["completion_mask"].bool(), inputs["advantages"]
            ratio = (logps - inputs["old_per_token_logps"]).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
            surrogate = torch.where(advantages < 0, torch.maximum(surrogate, 3.0 * advantages), surrogate)
            clipped += int(((ratio - 1).abs() > 0.28)[mask].sum())
            assert loss == pytest.approx(-surrogate[mask].sum().item() / num_tokens, rel=1e-5, abs=1e-8)
    assert clipped > 0


def test_influence_and_old_log_probs_of_the_shared_forward_equal_those_of_separate_ones(make_trainer):
    trainer = make_trainer(max_steps=2)
    model = trainer.model
    prompts = trainer._sample([], trainer.pipeline.first_batch())
    for prompt in prompts:
        for rollout in prompt.rollouts:
            ids = torch.tensor([prompt.prompt_ids + rollout.tokens.tolist()])
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


def test_the_oracle_is_asked_for_the_truth_of_each_step(make_trainer):
    asked = []

    def step_truth(example, steps):
        asked.append((str(example["prompt"]), "".join(steps)))
        return [float(index == len(steps) - 1) for index in range(len(steps))]

    settings = {"branching": "oracle", "expansion": "uniform", "filter_easy_prompts": False}
    trainer = make_trainer(step_truth=step_truth, max_steps=1, off_policy=False, **settings)
    trainer.train()
    rollouts = [r for p in trainer.batches[0] for r in p.rollouts]
    texts = [trainer.processing_class.decode(r.tokens.tolist()) for r in rollouts]
    assert [text for _, text in asked][: len(texts)] == texts
    assert {prompt for prompt, _ in asked} <= {str(prompt) for prompt in trainer.train_dataset["prompt"]}
    for rollout in rollouts:
        starts = [start for start, _ in rollout.step_ranges[1:]]
        assert not starts or starts[-1] in rollout.branch_points.offsets
    with pytest.raises(ValueError, match="branching='oracle' needs to know which steps matter; pass the trainer"):
        make_trainer(**settings)


@pytest.mark.parametrize("branching", ["attention", "entropy", "random", "first_steps"])
def test_every_criterion_trains_with_the_whole_leaf_budget(make_trainer, branching):
    trainer = make_trainer(branching=branching, expansion="uniform", filter_easy_prompts=False, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    (prompts,) = trainer.batches
    assert {len(branches_of(r)) for p in prompts for r in p.rollouts if len(r.step_ranges) > 1} == {4}
    assert all(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    rows = int(logged(trainer, "attnrl/rows_trained")[0])
    assert 30 < rows <= 60
    assert logged(trainer, "attnrl/updates") == [2.0]


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


def test_completions_of_one_token_have_no_branches(make_trainer):
    trainer = make_trainer(max_completion_length=1, max_steps=2)
    trainer.train()
    assert (trainer.pipeline.batches_trained, trainer.state.global_step) == (0, 2)
    assert all(len(r.tokens) == 1 and not branches_of(r) for p in trainer.batches[0] for r in p.rollouts)


def test_samples_are_drawn_without_an_adapters_dropout(make_trainer):
    adapter = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(peft_config=adapter, seeded_sampling=True)
    requests = [GenerationRequest([5, 6, 7, 8], 12, seed=seed) for seed in range(4)]
    trainer.model.train()  # as between updates
    torch.manual_seed(0)
    first = trainer.generate_requests(requests)
    torch.manual_seed(1)
    assert trainer.generate_requests(requests) == first
    assert any(module.training for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))


def test_unscorable_completions_are_out_of_values_rows_and_accuracy_and_counted(make_trainer):
    def sometimes_none(completions, completion_ids, **kwargs):
        return [None if sum(ids) % 3 == 0 else float(sum(ids) % 2) for ids in completion_ids]

    trainer = make_trainer(reward=sometimes_none, max_steps=2, logging_steps=2)
    trainer.train()
    samples = [leaf for prompts in trainer.batches for p in prompts for leaf in p.leaves]
    assert {sample.reward for sample in samples} == {0.0, 1.0}
    counters = trainer.pipeline.counters
    # Each initial rollout was sampled six times a prompt, each continuation four times an expanded rollout.
    assert counters["unscorable"] > 0
    assert counters["samples"] == len(samples) + counters["unscorable"]
    whole = [p for prompts in trainer.batches for p in prompts]
    assert any(len(p.rollouts) < 6 for p in whole)
    for prompt in whole:
        for path in tree_paths(prompt.trees()):
            rollout = prompt.rollouts[path.tree]
            assert sum(rollout.tokens[: len(path.tokens)]) >= 0  # rows hold scored leaves only


def test_where_all_that_can_be_scored_is_right_there_is_nothing_to_learn(make_trainer):
    trainer = make_trainer(
        reward=lambda completions, completion_ids, **kwargs: [1.0 if sum(ids) % 2 else None for ids in completion_ids],
        filter_easy_prompts=False,
        max_steps=2,
    )
    trainer.train()
    assert (trainer.pipeline.batches_trained, trainer.state.global_step) == (0, 2)
    assert trainer.pipeline.counters["unscorable"] > 0


def test_a_prompt_that_no_reward_function_can_score_is_dropped_before_branching(make_trainer):
    def is_unscorable(text):
        return sum(map(ord, text)) % 2 == 0

    def none_for_some_prompts(completions, completion_ids, prompts, **kwargs):
        odd = odd_sum(completions, completion_ids)
        return [None if is_unscorable(p[-1]["content"]) else value for p, value in zip(prompts, odd, strict=True)]

    trainer = make_trainer(reward=none_for_some_prompts, max_steps=6)
    trainer.train()
    kept = [p for prompts in trainer.batches for p in prompts]
    drawn = {draw.serial: draw for draw in trainer.pipeline.stream.draws(0, trainer.pipeline.stream.next_serial)}
    content = {s: trainer.train_dataset[d.index]["prompt"][-1]["content"] for s, d in drawn.items()}
    unscorable = {serial for serial, text in content.items() if is_unscorable(text)}
    assert unscorable and {p.draw.serial for p in kept} == drawn.keys() - unscorable
    counters = trainer.pipeline.counters
    assert counters["unscorable_prompts"] == len(unscorable)
    assert counters["unscorable"] == 6 * len(unscorable)  # none of them was branched


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
    assert logged(trainer, "tokens")[0] == (6 * len(prompts) + num_branches) / 2
    leaves = [(path, leaf) for p in prompts for path, leaf in zip(tree_paths(p.trees()), p.leaves, strict=True)]
    logs = trainer._logs
    assert list(logs["advantages"]) == [path.advantages[-1] for path, _ in leaves]
    assert list(logs["rewards"]["reward"]) == [leaf.reward for _, leaf in leaves]
    assert list(logs["extra"]["length"]) == [len(path.tokens) for path, _ in leaves]
    texts = trainer.processing_class.batch_decode([path.tokens for path, _ in leaves], skip_special_tokens=True)
    assert [completion[0]["content"] for completion in logs["completion"]] == texts


def test_truncated_completions_are_masked_on_demand(make_trainer):
    trainer = make_trainer(
        mask_truncated_completions=True, max_completion_length=40, max_steps=2, num_rollouts=10, num_branch_points=0
    )
    trainer.train()
    eos = trainer.processing_class.eos_token_id
    masked = 0
    for update in by_update(trainer):
        total = 0
        for inputs, _, _ in update:
            for i, length in enumerate(inputs["completion_mask"].sum(1).tolist()):
                masked += length == 0
                total += length
                assert length == 0 or inputs["completion_ids"][i][length - 1] == eos
        # TRL's normaliser of a micro-batch.
        weight, num_items = inputs["weight"], inputs["num_items_in_batch"].item()
        assert num_items * weight.steps / trainer.args.steps_per_generation == pytest.approx(total)
    assert masked > 0


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_lora_trains_the_adapter_only(make_trainer, beta):
    trainer = make_trainer(peft_config=LoraConfig(r=4, target_modules="all-linear"), beta=beta, max_steps=4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert (len(logged(trainer, "kl")) > 0) == (beta > 0)


def test_evaluation_is_plain_generation(make_trainer, arithmetic_dataset):
    trainer = make_trainer(
        eval_dataset=arithmetic_dataset, eval_strategy="steps", eval_steps=1, max_steps=4, per_device_eval_batch_size=8
    )
    trainer.train()
    rewards = logged(trainer, "eval_reward")
    assert len(rewards) == len(logged(trainer, "attnrl/updates"))  # one after each generation batch
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
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


def test_every_entry_of_the_log_has_the_rewards_of_its_generation_batch(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    assert len(logged(trainer, "attnrl/updates")) < 3
    assert len(logged(trainer, "reward")) == len(logged(trainer, "rewards/odd_sum/mean")) == 4  # the summary's too


def test_seconds_are_of_a_generation_batch(make_trainer, monkeypatch):
    clock = itertools.count()
    trainer = make_trainer(off_policy=False, max_steps=1)
    monkeypatch.setattr("attn_trainers.attnrl.trainer.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer.train()
    # Two calls each take a second by this clock: for the initial rollouts, and for the continuations.
    assert logged(trainer, "attnrl/seconds/generate") == [2.0]


def test_beams_of_transformers_generation(make_trainer):
    trainer = make_trainer(generation_kwargs={"num_beams": 2}, max_steps=1)
    trainer.train()
    assert all(1 <= len(leaf.tokens) <= 12 for p in trainer.batches[0] for leaf in p.leaves)


def test_an_empty_completion_has_no_value_and_counts(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    generate = trainer.generate_requests

    def some_empty(requests):
        return [replace(s, token_ids=[]) if i % 5 == 0 else s for i, s in enumerate(generate(requests))]

    monkeypatch.setattr(trainer, "generate_requests", some_empty)
    trainer.train()
    counters = trainer.pipeline.counters
    assert counters["empty"] > 0
    leaves = [leaf for prompts in trainer.batches for p in prompts for leaf in p.leaves]
    assert all(len(leaf.tokens) for leaf in leaves)
    assert counters["samples"] == len(leaves) + counters["empty"]


def test_old_log_probs_of_the_trainer_serve_off_policy_masking_where_the_sampler_gives_none(make_trainer):
    trainer = make_trainer(off_policy_mask_threshold=0.0, beta=0.0, learning_rate=0.1, max_steps=2)
    trainer.train()
    assert all("sampling_per_token_logps" not in inputs for inputs, _, _ in trainer.losses)
    inputs, logps, loss = by_update(trainer)[1][0]
    mask, advantages = inputs["completion_mask"], inputs["advantages"]
    drift = ((inputs["old_per_token_logps"] - logps) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    dropped = (advantages < 0) & (drift > 0)
    assert dropped.any()
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    surrogate = torch.minimum(ratio.clamp(max=3.0) * advantages, ratio.clamp(0.8, 1.28) * advantages)
    num_tokens = sum(int(one["completion_mask"].sum()) for one, _, _ in by_update(trainer)[1])
    expected = -(surrogate * mask)[~dropped].sum().item() / num_tokens
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_reward_of_whole_groups_is_refused(make_trainer):
    with pytest.raises(ValueError, match="length_penalised_accuracy_reward, which compares .* trees have none"):
        make_trainer(reward=get_length_penalised_accuracy_reward(num_generations=4))


def test_what_trl_asks_for_is_still_asked_for(make_trainer, tiny_model_dir, tmp_path, arithmetic_dataset):
    args = AttnRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="reward_funcs"):
        AttnRLTrainer(str(tiny_model_dir), args=args, train_dataset=arithmetic_dataset)
    images = arithmetic_dataset.add_column("image", [None] * len(arithmetic_dataset))
    with pytest.raises(ValueError, match="train_dataset has the column 'image'"):
        AttnRLTrainer(str(tiny_model_dir), odd_sum, args, train_dataset=images)
