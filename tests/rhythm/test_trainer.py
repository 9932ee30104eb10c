"""RhythmTrainer: what it does to advantages against independent computations, and where it must do nothing."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from attn_trainers import RhythmConfig, RhythmTrainer
from attn_trainers.attention import rhythm_signals
from attn_trainers.attention.heads import HeadSets
from attn_trainers.base import credit_trainer, forwards
from attn_trainers.rhythm import method
from attn_trainers.rhythm.attention_rows import ANCHOR_FRACTION, row_breadth, row_concentration
from attn_trainers.rhythm.credit import anchor_tokens, credit_factors, top_tokens
from attn_trainers.rhythm.reward import rhythm_reward
from tests.helpers import logged


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}


@pytest.fixture
def build(sharp_model_dir, tiny_tokenizer, arithmetic_dataset, reward, settings):
    """Trainer on the sharp model; options are fields of the config."""

    def make(trainer_class=RhythmTrainer, config_class=RhythmConfig, reward_funcs=reward, lora=False, **options):
        torch.manual_seed(7)  # LoRA's initial weights
        return trainer_class(
            str(sharp_model_dir),
            reward_funcs,
            config_class(**(settings | options)),
            train_dataset=arithmetic_dataset,
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
        )

    return make


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def sequences(output) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Token ids and mask (B, P+T) of a batch, and the prompt lengths."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    return ids, mask, output["prompt_mask"].sum(dim=1).tolist()


# ---- where nothing may differ from GRPO -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_scheme_and_reward_it_is_grpo_to_the_bit(build, lora, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("attention was read")

    for name in ("SignalObserver", "RewardObserver"):
        monkeypatch.setattr(method, name, refuse)
    monkeypatch.setattr(forwards, "observe_attention", refuse)
    monkeypatch.setattr(credit_trainer, "forward_for_attention", refuse)
    parent = build(GRPOTrainer, GRPOConfig, lora=lora)
    before = weights(parent)
    parent.train()
    ours = build(scheme="none", rhythm_lambda=0.0, lora=lora)
    assert_same_weights(before, weights(ours))
    ours.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(ours).items())
    assert_same_weights(weights(parent), weights(ours))
    assert logged(parent, "loss") == logged(ours, "loss")


def test_factors_of_one_are_grpo_to_the_bit(build):
    parent = build(GRPOTrainer, GRPOConfig)
    parent.train()
    ours = build(scheme="coupled", amplification=1.0)
    ours.train()
    assert logged(ours, "rhythm/mean_factor") == [1.0, 1.0]
    assert_same_weights(weights(parent), weights(ours))


def test_evaluation_reads_no_attention(build, arithmetic_dataset):
    trainer = build(scheme="coupled", per_device_eval_batch_size=4)
    result = trainer.evaluate(arithmetic_dataset.select(range(2)))
    assert 0.0 <= result["eval_reward"] <= 1.0
    assert trainer.credit.batches == 0 and not any("rhythm" in name for name in result)


# ---- credit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["local", "global", "coupled", "coupled_bottom"])
@pytest.mark.parametrize("head_scope", ["batch", "sequence"])
def test_factors_follow_from_the_policys_attention(build, with_given, sharp_model_dir, scheme, head_scope):
    trainer = build(with_given(RhythmTrainer), scheme=scheme, head_scope=head_scope, max_steps=1)
    trainer.train()
    output = trainer.outputs[0]
    ids, mask, prompts = sequences(output)
    model = AutoModelForCausalLM.from_pretrained(sharp_model_dir)
    signals = rhythm_signals(model, ids, mask, prompts, head_scope=head_scope)
    expected = torch.ones_like(output["credit"])
    for row, signal in enumerate(signals):
        factors = credit_factors(signal.waad, signal.fai, scheme)
        expected[row, : len(factors)] = factors
    assert len({len(signal.waad) for signal in signals}) > 1  # rows of different lengths
    assert torch.equal(output["credit"], expected)
    assert output["credit"].max() > 1
    if head_scope == "batch":
        assert trainer.last_credit.details.heads == [(signals[0].local_heads, signals[0].global_heads)] * 8


def test_the_loss_takes_advantages_times_factors(build, with_given):
    trainer = build(with_given(RhythmTrainer), scheme="global", max_steps=1, learning_rate=0.0)
    trainer.train()
    output = trainer.outputs[0]
    product = output["advantages"][:, None] * output["credit"]
    trainer.current_gradient_accumulation_steps = 1
    ours = trainer._compute_loss(trainer.model, output)
    plain = {name: value for name, value in output.items() if name != "credit"}
    parents = GRPOTrainer._compute_loss(trainer, trainer.model, plain | {"advantages": product})
    assert torch.equal(ours, parents)
    assert not torch.equal(ours, GRPOTrainer._compute_loss(trainer, trainer.model, plain))


@pytest.mark.parametrize(("sign", "scaled"), [("pos", lambda a: a > 0), ("neg", lambda a: a < 0)])
def test_only_advantages_of_the_wanted_sign_are_scaled(build, with_given, sign, scaled):
    both = build(with_given(RhythmTrainer), scheme="local", max_steps=1)
    both.train()
    one = build(with_given(RhythmTrainer), scheme="local", gamma_sign=sign, max_steps=1)
    one.train()
    advantages, credit = one.outputs[0]["advantages"], one.outputs[0]["credit"]
    wanted = scaled(advantages)
    assert 0 < wanted.sum() < len(wanted)
    assert torch.equal(credit[wanted], both.outputs[0]["credit"][wanted])
    assert (credit[~wanted] == 1).all()


def test_random_credit_is_exact_in_number_and_changes_from_batch_to_batch(build, with_given):
    trainer = build(with_given(RhythmTrainer), scheme="random")
    trainer.train()
    for output in trainer.outputs:
        lengths = output["completion_mask"].sum(dim=1)
        assert (output["credit"] > 1).sum(dim=1).tolist() == [int(0.4 * n + 0.5) for n in lengths.tolist()]
    again = build(with_given(RhythmTrainer), scheme="random")
    again.train()
    assert [torch.equal(a["credit"], b["credit"]) for a, b in zip(trainer.outputs, again.outputs, strict=True)] == [
        True,
        True,
    ]
    width = min(output["credit"].shape[1] for output in trainer.outputs)
    assert not torch.equal(trainer.outputs[0]["credit"][:, :width], trainer.outputs[1]["credit"][:, :width])


@pytest.mark.parametrize("scheme", ["entropy", "entropy_bottom"])
def test_entropy_credit_goes_by_the_entropy_at_which_a_token_was_sampled(build, with_given, sharp_model_dir, scheme):
    trainer = build(with_given(RhythmTrainer), scheme=scheme, max_steps=1)
    trainer.train()
    output = trainer.outputs[0]
    ids, mask, prompts = sequences(output)
    model = AutoModelForCausalLM.from_pretrained(sharp_model_dir)
    for row in range(len(ids)):
        sequence = ids[row][mask[row].bool()][None]
        with torch.no_grad():
            logits = model(sequence).logits[0, prompts[row] - 1 : -1]  # the rows that generate the completion
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        selected = top_tokens(entropy.double(), 0.4, largest=scheme == "entropy")
        assert torch.equal(output["credit"][row, : len(entropy)] > 1, selected)


def test_punctuation_is_skipped_on_request(build, with_given, tiny_tokenizer):
    trainer = build(with_given(RhythmTrainer), scheme="global", skip_punctuation=True, max_steps=1)
    sign = tiny_tokenizer.convert_tokens_to_ids(" = ")
    number = tiny_tokenizer.convert_tokens_to_ids("7")
    words = trainer.credit.token_texts.is_word([sign, number, tiny_tokenizer.eos_token_id])
    assert words.tolist() == [False, True, False]
    trainer.train()
    output = trainer.outputs[0]
    for credit, ids in zip(output["credit"], output["completion_ids"].tolist(), strict=True):
        selected = [i for i, factor in zip(ids, credit.tolist(), strict=True) if factor > 1]
        assert selected and trainer.credit.token_texts.is_word(selected).all()


def test_logged_shares_are_those_of_the_factors(build, with_given):
    trainer = build(with_given(RhythmTrainer), scheme="coupled", max_steps=1)
    trainer.train()
    output = trainer.outputs[0]
    real = output["completion_mask"].bool()
    credit = output["credit"][real]
    assert logged(trainer, "rhythm/mean_factor") == pytest.approx([credit.mean().item()], rel=1e-6)
    assert logged(trainer, "rhythm/amplified_share") == pytest.approx([(credit > 1).float().mean().item()], rel=1e-6)
    assert 0.0 < logged(trainer, "rhythm/dominated_share")[0] < 0.4
    assert 0.0 < logged(trainer, "rhythm/waad_mean")[0] < 10.0
    assert 0.0 < logged(trainer, "rhythm/fai_mean")[0] < 1.0
    assert 0.0 < logged(trainer, "rhythm/seconds/attention_share")[0] < 1.0


# ---- rhythm reward --------------------------------------------------------------------------------------------------


def expected_rhythm(model, output, heads) -> list:
    """Rhythm rewards from eager attention, with dense maps."""
    ids, mask, prompts = sequences(output)
    rewards = []
    signals = rhythm_signals(model, ids, mask, prompts, head_scope=heads)
    for row, signal in enumerate(signals):
        sequence = ids[row][mask[row].bool()][None]
        with torch.no_grad():
            maps = model(sequence, output_attentions=True).attentions
        mean_map = torch.stack([maps[layer][0, head] for layer, head in heads[1]]).mean(dim=0)  # (N, N)
        positions = torch.arange(prompts[row], sequence.shape[1])
        rows = mean_map[positions]
        anchors = anchor_tokens(signal.fai, ANCHOR_FRACTION)
        concentration = row_concentration(rows, positions, anchors, prompts[row])
        rewards.append(rhythm_reward(signal.waad, signal.fai, row_breadth(rows, positions), concentration))
    return rewards


def grouped(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 4)


@pytest.mark.parametrize("head_scope", ["calibration", "batch"])
def test_split_reward_adds_the_normalised_rhythm(build, with_given, sharp_model_dir, head_scope):
    options = {"calibration_responses": 8, "reward_head_scope": head_scope}
    plain = build(with_given(RhythmTrainer), scheme="none", rhythm_lambda=0.0, learning_rate=0.0)
    plain.train()
    trainer = build(with_given(RhythmTrainer), preset="rhythm_reward", learning_rate=0.0, **options)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(sharp_model_dir, attn_implementation="eager")
    # Heads are known before the forward of the second batch, but not of the first.
    for step, (task, output) in enumerate(zip(plain.outputs, trainer.outputs, strict=True)):
        ids, mask, prompts = sequences(trainer.outputs[step if head_scope == "batch" else 0])
        chosen = rhythm_signals(model, ids, mask, prompts, head_scope="batch")[0]
        rewards = expected_rhythm(model, output, (chosen.local_heads, chosen.global_heads))
        means = grouped(torch.tensor([reward.mean for reward in rewards]))
        std = means.std(dim=1, keepdim=True).clamp(min=0.05)
        expected = task["advantages"] + 0.1 * ((means - means.mean(dim=1, keepdim=True)) / std).flatten()
        assert means.std() > 0
        torch.testing.assert_close(output["advantages"], expected, rtol=1e-4, atol=1e-5)
        assert "credit" not in output
    assert torch.tensor([reward.mean for reward in trainer.last_credit.details.rewards]).tolist() == pytest.approx(
        means.flatten().tolist(), abs=1e-5
    )


def test_total_reward_is_normalised_with_the_task(build, with_given):
    trainer = build(
        with_given(RhythmTrainer), preset="rhythm_reward", reward_mode="total", calibration_responses=8, max_steps=1
    )
    trainer.train()
    rhythm = torch.tensor([reward.mean for reward in trainer.last_credit.details.rewards])
    total = grouped(trainer.last_rewards_per_func[:, 0] + 0.1 * rhythm)
    expected = (total - total.mean(dim=1, keepdim=True)) / (total.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(trainer.outputs[0]["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)


def test_token_reward_centres_on_the_groups_tokens(build, with_given):
    options = {"preset": "rhythm_reward", "reward_mode": "token", "calibration_responses": 8, "max_steps": 1}
    trainer = build(with_given(RhythmTrainer), scheme="local", **options)
    trainer.train()
    output = trainer.outputs[0]
    task = grouped(trainer.last_rewards_per_func[:, 0])
    task = ((task - task.mean(dim=1, keepdim=True)) / (task.std(dim=1, keepdim=True) + 1e-4)).flatten()
    for group in range(2):
        rows = range(4 * group, 4 * group + 4)
        mean = torch.cat([trainer.last_credit.details.rewards[row].per_token for row in rows]).mean()
        for row in rows:
            per_token = trainer.last_credit.details.rewards[row].per_token
            expected = task[row] + 0.1 * (per_token - mean)
            torch.testing.assert_close(output["advantages"][row, : len(per_token)], expected, rtol=1e-4, atol=1e-5)
    assert output["credit"].shape == output["advantages"].shape  # factors come last, on top of the rhythm


def test_nothing_happens_before_the_heads_are_calibrated(build, with_given):
    options = {"head_scope": "calibration", "calibration_responses": 16, "rhythm_lambda": 0.1, "max_steps": 3}
    trainer = build(with_given(RhythmTrainer), scheme="coupled", **options)
    trainer.train()
    assert logged(trainer, "rhythm/calibrated") == [0.0, 1.0, 1.0]
    assert (trainer.outputs[0]["credit"] == 1).all()
    assert [(output["credit"] > 1).any().item() for output in trainer.outputs] == [False, True, True]
    assert len(logged(trainer, "rhythm/reward/mean")) == 2
    assert logged(trainer, "rhythm/head_jaccard/local") == [1.0]


# ---- odd batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"scheme": "coupled"}, {"preset": "rhythm_reward", "reward_mode": "token"}])
def test_one_token_completions(build, with_given, options):
    trainer = build(with_given(RhythmTrainer, lengths=(1, 1)), calibration_responses=8, **options)
    before = weights(trainer)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    for output in trainer.outputs:
        if "credit" in output:
            assert (output["credit"] == 1).all()


def test_equal_rewards_leave_the_policy_alone(build, with_given):
    trainer = build(with_given(RhythmTrainer), scheme="coupled", reward_funcs=lambda completions, **_: [1.0] * 8)
    before = weights(trainer)
    trainer.train()
    assert_same_weights(before, weights(trainer))
    assert (trainer.outputs[0]["credit"] > 1).any()


def test_masked_completions_get_no_credit(build, with_given):
    """None of the given completions ends in EOS, so all are masked out."""
    trainer = build(
        with_given(RhythmTrainer),
        scheme="coupled",
        rhythm_lambda=0.1,
        calibration_responses=1,
        mask_truncated_completions=True,
    )
    trainer.train()
    assert trainer.credit.calibration.heads is None  # no response token was seen
    assert all((output["credit"] == 1).all() for output in trainer.outputs)
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_unscored_completions_get_no_advantage(build, with_given):
    def some(completions, completion_ids, **kwargs):
        return [None if ids[0] % 2 else float(ids[-1] % 2) for ids in completion_ids]

    for mode in ("split", "total", "token"):
        trainer = build(
            with_given(RhythmTrainer),
            preset="rhythm_reward",
            reward_mode=mode,
            calibration_responses=8,
            reward_funcs=some,
            max_steps=1,
        )
        trainer.train()
        unscored = trainer.last_rewards_per_func[:, 0].isnan()
        advantages = trainer.outputs[0]["advantages"].reshape(8, -1)
        assert 0 < unscored.sum() < 8
        assert (advantages[unscored] == 0).all() and (advantages[~unscored] != 0).any()


# ---- checkpoints, card, vLLM ----------------------------------------------------------------------------------------


def test_resume_keeps_calibrated_heads_and_the_course_of_the_run(build, with_given, settings):
    options = {
        "scheme": "random",
        "rhythm_lambda": 0.1,
        "calibration_responses": 8,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = build(with_given(RhythmTrainer), **options)
    whole.train()
    checkpoint = Path(settings["output_dir"]) / "checkpoint-2"
    state = json.loads((checkpoint / "rhythm_state.json").read_text())
    assert state["batches"] == 2
    resumed = build(with_given(RhythmTrainer), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.credit.calibration.heads == whole.credit.calibration.heads
    assert [list(head) for head in resumed.credit.calibration.heads.local_heads] == state["calibration"]["heads"][0]
    assert [
        torch.equal(a["credit"], b["credit"]) for a, b in zip(resumed.outputs, whole.outputs[2:], strict=True)
    ] == [
        True,
        True,
    ]
    assert_same_weights(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("saved_at", "options"),
    [(3, {"save_steps": 3}), (3, {"save_steps": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4})],
    ids=["in the second epoch", "inside a generation batch, where max_steps was raised"],
)
def test_a_resumed_run_takes_the_prompts_that_it_would_have_taken(build, with_given, settings, saved_at, options):
    # Four prompts, two a generation batch: an epoch is two batches, and each epoch has an order of its own.
    def run(max_steps, resume=None):
        steps = {"max_steps": max_steps, "scheme": "random", "save_strategy": "steps"}
        trainer = build(with_given(RhythmTrainer), **(options | steps))
        trainer.train_dataset = trainer.train_dataset.select(range(4))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(8)
    cut = run(saved_at)
    boundary = cut.is_between_generations()
    resumed = run(8, str(Path(settings["output_dir"]) / f"checkpoint-{saved_at}"))
    prompts = [[output["prompt_ids"].tolist() for output in trainer.outputs] for trainer in (whole, cut, resumed)]
    done = len(prompts[1]) - (not boundary)  # a batch that was cut in two is sampled twice
    assert prompts[2] == prompts[0][done:] and prompts[1] == prompts[0][: len(prompts[1])]
    assert resumed.sampled_at == [saved_at, *(step for step in whole.sampled_at if step > saved_at)]
    assert len({str(sorted(batch)) for batch in prompts[0]}) > 2
    assert whole.is_between_generations() and resumed.is_between_generations()


def test_card_names_method_paper_and_tags(build, settings):
    trainer = build(scheme="coupled")
    trainer.create_model_card(model_name="anchors")
    card = (Path(settings["output_dir"]) / "README.md").read_text()
    for text in ("trained with Rhythm", "2510.13554", "- rhythm", "Yang Li and Zhichen Dong"):
        assert text in card


def test_transformers_generation_of_all_schemes(build):
    """Sampled completions, LoRA and an update of two micro-batches: every scheme trains."""
    for scheme in ("random", "entropy", "local", "global", "coupled"):
        trainer = build(scheme=scheme, lora=True, gradient_accumulation_steps=2, max_steps=1)
        before = weights(trainer)
        trainer.train()
        assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
        assert 1.0 < logged(trainer, "rhythm/mean_factor")[0] < 1.5


@pytest.mark.slow
def test_vllm_colocate_reads_attention_in_the_old_log_probs(build, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr(RhythmTrainer, "_read_signal_alone", None)  # no forward of its own is made
    trainer = build(
        scheme="coupled",
        rhythm_lambda=0.1,
        calibration_responses=8,
        reward_head_scope="calibration",
        use_vllm=True,
        vllm_max_model_length=128,
        max_steps=1,
    )
    trainer.credit.calibration.heads = HeadSets([(1, 0), (2, 1)], [(1, 3), (2, 2)])
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert logged(trainer, "rhythm/calibrated") == [1.0]
    assert len(trainer.last_credit.details.rewards) == 8 and any(
        reward.mean != 0 for reward in trainer.last_credit.details.rewards
    )
    assert max(factors.max().item() for factors in trainer.last_credit.details.factors) > 1.0
