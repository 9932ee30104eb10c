"""AttnPO's trainer on given completions: rewards, advantages and credit against independent formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from attn_trainers import AttnPOConfig, AttnPOTrainer
from attn_trainers.tiny.arithmetic import build_model, prompt_messages, sample_problems
from attn_trainers.tiny.runs import exact_answer_reward
from tests.helpers import logged


HEADS = [[0, 1], [1, 0]]
COMMON = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 64,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "scale_rewards": "none",
    "delta": 3.0,
    "loss_type": "dapo",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def attnpo_config(folder, **options) -> AttnPOConfig:
    return AttnPOConfig(str(folder), **(COMMON | {"heads": HEADS, "step_mode": "paragraphs"} | options))


@pytest.fixture
def build(model, tokenizer, dataset, make_fixed, tmp_path):
    """Trainer with given completions, which keeps what it made of each generation batch in `outputs`."""

    def make(completions, trainer_class=AttnPOTrainer, reward_funcs=exact_answer_reward, args=None, **kwargs):
        fixed = make_fixed(trainer_class, completions)

        class Recorded(fixed):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                self.outputs.append(output)
                return output

        trainer = Recorded(
            kwargs.pop("model", model),
            reward_funcs,
            args=args or attnpo_config(tmp_path),
            train_dataset=kwargs.pop("train_dataset", dataset),
            processing_class=tokenizer,
            **kwargs,
        )
        trainer.outputs = []
        return trainer

    return make


def leave_one_out(rewards: list[float]) -> list[float]:
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def penalised(correct: list[float], lengths: list[int], weight: float = 0.2) -> list[float]:
    right = [length for c, length in zip(correct, lengths, strict=True) if c]
    mean = sum(right) / max(len(right), 1)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in right) / max(len(right), 1))
    return [
        c * (1 - weight / (1 + math.exp(-(length - mean) / (deviation + 1e-8))))
        for c, length in zip(correct, lengths, strict=True)
    ]


def expected_group(model, rows: list[dict], progress: float) -> list[list[float]]:
    """Token advantages of one prompt's responses, from eager attention and the formulas of the method."""
    lengths = [len(row["completion"]) for row in rows]
    advantages = leave_one_out(penalised([row["correct"] for row in rows], lengths))
    accuracy = sum(row["correct"] for row in rows) / len(rows)
    result = []
    for row, advantage in zip(rows, advantages, strict=True):
        ids = row["prompt"] + row["completion"]
        tokens = [advantage] * len(row["completion"])
        if row["correct"]:
            attention = model(torch.tensor([ids]), output_attentions=True).attentions
            weights = torch.stack([attention[layer][0, head] for layer, head in HEADS]).mean(0)  # (L, L)
            answer = len(row["prompt"]) + row["end"] + 1
            received = weights[answer:].sum(0)  # (L,)
            base = accuracy**2 * (len(ids) - answer) / len(ids)
            for start, end in row["steps"]:
                score = received[len(row["prompt"]) + start : len(row["prompt"]) + end].mean().item()
                factor = 1.0
                if advantage > 0 and score < base and progress > 1 - accuracy:
                    factor = 1 - accuracy**2 + accuracy**2 * score / base
                elif advantage < 0 and score > base:
                    factor = 0.0
                tokens[start:end] = [advantage * factor] * (end - start)
        result.append(tokens)
    return result


def rows_of(output, tokenizer, answers: dict[str, str]) -> list[dict]:
    """Rows of a batch with their steps, found on the tokens: a step ends after a blank line."""
    rows = []
    for ids, mask, prompt, prompt_mask in zip(
        output["completion_ids"],
        output["completion_mask"],
        output["prompt_ids"],
        output["prompt_mask"],
        strict=True,
    ):
        completion = ids[mask.bool()].tolist()
        words = [tokenizer.decode([token]) for token in completion]
        end = words.index("</think>")
        cuts = [0, *(i + 1 for i, word in enumerate(words[:end]) if word == "\n\n")]
        prompt = prompt[prompt_mask.bool()].tolist()
        answer = answers[tokenizer.decode(prompt).removesuffix("<think>")]
        rows.append(
            {
                "prompt": prompt,
                "completion": completion,
                "end": end,
                "steps": list(zip(cuts[:-1], cuts[1:], strict=True)),
                "correct": float(words[-4:-1] == ["\\boxed{", answer, "}"]),
            }
        )
    return rows


def test_advantages_and_credit_agree_with_eager_attention(build, mixed, model, tokenizer, problems, tmp_path):
    reference = type(model)(model.config)
    reference.load_state_dict(model.state_dict())
    reference.set_attn_implementation("eager")
    trainer = build(mixed, args=attnpo_config(tmp_path, schedule_fraction=0.5, max_steps=2))
    trainer.train()
    output = trainer.outputs[0]
    rows = rows_of(output, tokenizer, {p.text: p.answer for p in problems})
    assert [row["correct"] for row in rows].count(1.0) == 13
    with torch.no_grad():
        expected = [
            tokens for i in range(0, 16, 4) for tokens in expected_group(reference, rows[i : i + 4], progress=1.0)
        ]
    actual = output["advantages"].unsqueeze(1) * output["credit"]
    for row, tokens in enumerate(expected):
        torch.testing.assert_close(actual[row, : len(tokens)], torch.tensor(tokens), rtol=1e-5, atol=1e-6)
    # The policy is the one that sampled, so the ratio is 1 and the loss is minus the mean advantage per token.
    flat = [token for tokens in expected for token in tokens]
    assert logged(trainer, "loss")[0] == pytest.approx(-sum(flat) / len(flat), abs=1e-6)
    assert 0 < logged(trainer, "attnpo/steps_attenuated")[0] < 1
    assert logged(trainer, "attnpo/accuracy")[0] == 13 / 16
    assert logged(trainer, "attnpo/groups_all_correct")[0] == 1 / 4
    assert logged(trainer, "attnpo/thinking_tokens")[0] == sum(row["end"] + 1 for row in rows) / 16
    assert logged(trainer, "attnpo/steps_per_response")[0] == sum(len(row["steps"]) for row in rows) / 16


def test_attenuation_opens_with_progress_and_survives_resume(build, mix, tokenizer, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    problems = sample_problems(24, seed=6, num_operations=2)
    completions = mix(problems, all_right=list(range(0, 24, 2)))
    data = Dataset.from_list([{"prompt": prompt_messages(p), "answer": p.answer} for p in problems])
    whole = build(completions, args=attnpo_config(tmp_path / "whole", **settings), train_dataset=data)
    whole.train()
    assert logged(whole, "attnpo/progress") == [0.25, 0.5, 0.75, 1.0]
    # Three of four right: nothing is attenuated until more than a quarter is done; all right: from the first step on.
    last = [response for response in whole.last_credit.details if response.accuracy == 0.75 and response.advantage > 0]
    assert last and any(response.attenuated.any() for response in last)
    first = whole.outputs[0]
    three_of_four = first["advantages"].view(4, 4).lt(-0.5).any(dim=1).repeat_interleave(4)
    assert (first["credit"][three_of_four] == 1).all() and (first["credit"][~three_of_four] != 1).any()

    fresh = build_model(tokenizer, hidden_size=64, num_layers=2)
    args = attnpo_config(tmp_path / "again", **(settings | {"max_steps": 6}))
    resumed = build(completions, args=args, model=fresh, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(resumed.outputs[0]["credit"], whole.outputs[2]["credit"])
    assert torch.equal(resumed.outputs[1]["credit"], whole.outputs[3]["credit"])
    # The run was prolonged from 4 to 6 steps; its schedule still ends at 4.
    assert logged(resumed, "attnpo/progress")[-4:] == [0.75, 1.0, 1.0, 1.0]


def test_without_scaling_it_is_tlmre_to_the_bit(build, mixed, model, tmp_path):
    def tlmre_reward(completions, completion_ids, answer, **kwargs):
        correct, rewards = exact_answer_reward(completions, answer), []
        for start in range(0, len(correct), 4):
            lengths = [len(ids) for ids in completion_ids[start : start + 4]]
            rewards += penalised(correct[start : start + 4], lengths)
        return rewards

    class LeaveOneOut(GRPOTrainer):
        def _calculate_rewards(self, *args, **kwargs):
            self.seen = super()._calculate_rewards(*args, **kwargs)
            return self.seen

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            groups = self.seen.double().view(-1, 4).tolist()
            output["advantages"] = torch.tensor([a for group in groups for a in leave_one_out(group)])
            return output

    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain = build(mixed, LeaveOneOut, tlmre_reward, GRPOConfig(str(tmp_path / "plain"), **(COMMON | {"max_steps": 2})))
    plain.train()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(start)
    off = {"attenuate_positive": False, "protect_negative": False, "heads": None, "max_steps": 2}
    ours = build(mixed, args=attnpo_config(tmp_path / "off", **off))
    ours.train()
    assert logged(ours, "loss") == logged(plain, "loss") and len(logged(ours, "loss")) == 2
    assert logged(ours, "grad_norm") == logged(plain, "grad_norm")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
        assert not torch.equal(value, start[name]), name
    # And the switches matter: with them on, the same two steps end elsewhere.
    model.load_state_dict(start)
    on = build(mixed, args=attnpo_config(tmp_path / "on", max_steps=2, schedule_fraction=0.0))
    on.train()
    assert logged(on, "loss") != logged(plain, "loss")


def test_signal_is_the_same_from_the_forward_for_old_logps(build, mixed, model, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    alone = build(mixed, args=attnpo_config(tmp_path, schedule_fraction=0.0))
    alone.train()
    model.load_state_dict(start)
    updates = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "schedule_fraction": 0.0}
    shared = build(mixed, args=attnpo_config(tmp_path, **updates))
    shared.train()
    assert "old_per_token_logps" in shared.outputs[0] and "old_per_token_logps" not in alone.outputs[0]
    torch.testing.assert_close(shared.outputs[0]["credit"], alone.outputs[0]["credit"], rtol=1e-5, atol=1e-6)
    assert (alone.outputs[0]["credit"] < 1).any()


def test_responses_without_steps_are_counted_and_trained_on(build, mixed, problems, tmp_path):
    texts = dict(mixed.texts)
    right = texts[problems[0].text]
    texts[problems[0].text] = [right[0], "7", "7\n\n7 + 7", right[0].replace("</think>", "</think></think>")]
    texts[problems[1].text] = [right[0].replace("\\boxed{", "\\boxed{1} \\boxed{1")] * 4  # all wrong
    texts[problems[2].text] = [texts[problems[2].text][0], "7\n\n8</think>", "7</think>8", right[1]]
    mixed.texts = texts
    trainer = build(mixed, args=attnpo_config(tmp_path, schedule_fraction=0.0, max_steps=2, page_steps=2))
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert logged(trainer, "attnpo/excluded/no_end_of_thinking")[0] == 2 / 16
    assert logged(trainer, "attnpo/excluded/several_end_of_thinking")[0] == 1 / 16
    assert logged(trainer, "attnpo/excluded/no_answer")[0] == 1 / 16
    assert logged(trainer, "attnpo/excluded/too_few_steps")[0] == 1 / 16
    by_prompt = trainer.outputs[0]["advantages"].view(4, 4)
    assert (by_prompt == 0).all(dim=1).sum() == 1  # the prompt that was never solved

    pages = sorted(path.name for path in (tmp_path / "attnpo").iterdir())
    assert pages == ["step-000000.html", "step-000000.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "attnpo" / pages[1]).read_text().splitlines()]
    assert [len(record["steps"]) for record in records].count(0) == 5
    shown = max(records, key=lambda r: (sum(s["scale"] not in (None, 1.0) for s in r["steps"]), len(r["steps"])))
    page = (tmp_path / "attnpo" / pages[0]).read_text()
    scaled = [step for step in shown["steps"] if step["scale"] not in (None, 1.0)]
    assert scaled and page.count('<div class="step ') == len(scaled)
    assert all(f"γ {step['scale']:.2f}" in page for step in scaled)


def test_several_rewards_combine_and_unknown_correctness_is_left_out(build, mixed, problems, tmp_path):
    hidden = problems[0].answer

    def style(completions, **kwargs):
        return [0.1 * ("Wait" in completion[0]["content"]) for completion in completions]

    def correct(completions, answer, **kwargs):
        known = exact_answer_reward(completions, answer)
        return [None if a == hidden and i % 4 == 3 else r for i, (r, a) in enumerate(zip(known, answer, strict=True))]

    args = attnpo_config(tmp_path, accuracy_reward="correct", reward_weights=[2.0, 1.0], schedule_fraction=0.0)
    trainer = build(mixed, reward_funcs=[style, correct], args=args)
    trainer.train()
    output, column = trainer.outputs[0], trainer.last_rewards_per_func
    assert logged(trainer, "rewards/style/mean")[0] == pytest.approx(0.075)
    assert column[:, 1].isnan().sum() == 1
    for rewards, advantages in zip(column.view(4, 4, 2), output["advantages"].view(4, 4), strict=True):
        total = (rewards.nan_to_num(nan=0.0) * torch.tensor([2.0, 1.0])).sum(1).tolist()
        torch.testing.assert_close(advantages, torch.tensor(leave_one_out(total)), rtol=1e-5, atol=1e-6)
    group = [r for r in trainer.last_credit.details if r.accuracy == pytest.approx(2 / 3)]
    assert len(group) == 4  # of the three whose correctness is known, two are right

    graded = build(mixed, reward_funcs=[style], args=attnpo_config(tmp_path))
    with pytest.raises(ValueError, match="accuracy_reward='style' returned other values than 0 and 1"):
        graded.train()
    with pytest.raises(ValueError, match="accuracy_reward='typo'.*exact_answer_reward"):
        build(mixed, args=attnpo_config(tmp_path, accuracy_reward="typo"))


def test_evaluation_is_plain_accuracy(build, mixed, dataset, tmp_path):
    trainer = build(mixed, eval_dataset=dataset, args=attnpo_config(tmp_path, num_generations_eval=4))
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/exact_answer_reward/mean"] == pytest.approx(13 / 16)
    assert not any(name.startswith("eval_attnpo") for name in metrics)


def test_lora_with_a_reference_model(build, mixed, model, tmp_path):
    frozen = model.model.layers[0].self_attn.q_proj.weight.clone()
    args = attnpo_config(tmp_path, beta=0.1, schedule_fraction=0.0, max_steps=2)
    trainer = build(mixed, args=args, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    trainer.train()
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, frozen) and layer.lora_B["default"].weight.abs().sum() > 0
    assert (trainer.outputs[0]["credit"] < 1).any()
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6) and logged(trainer, "kl")[1] > 0


def test_generation_by_transformers_with_one_token_completions(model, tokenizer, dataset, tmp_path):
    trainer = AttnPOTrainer(
        model,
        exact_answer_reward,
        args=attnpo_config(tmp_path, max_completion_length=1, max_steps=2),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    excluded = [logged(trainer, f"attnpo/excluded/{reason}") for reason in ("no_end_of_thinking", "no_answer")]
    assert [sum(shares) for shares in zip(*excluded, strict=True)] == [1.0, 1.0]
    assert logged(trainer, "attnpo/thinking_tokens") == [1.0, 1.0]
    assert logged(trainer, "loss") == [0.0, 0.0]


def test_identity_and_card(build, mixed, tmp_path):
    trainer = build(mixed)
    trainer.create_model_card(model_name="short-thoughts")
    card = Path(tmp_path, "README.md").read_text()
    assert "AttnPO" in card and "2602.09953" in card and "- attnpo" in card


def test_unknown_model_without_heads_names_the_command(build, mixed, tmp_path):
    with pytest.raises(ValueError, match="attn-trainers heads --model"):
        build(mixed, args=attnpo_config(tmp_path, heads=None))
    with pytest.raises(ValueError, match=r"heads contain \[2, 0\].*2 layers of 2 heads"):
        build(mixed, args=attnpo_config(tmp_path, heads=[[2, 0]]))


@pytest.mark.slow
def test_vllm_colocate_with_lora_and_a_missing_sampling_logp(model, tokenizer, dataset, tmp_path):
    class OneMissing(AttnPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            completion_ids, logps = super()._generate_single_turn(*args, **kwargs)
            logps[0][0] = None  # what TRL makes of vLLM's NaN
            return completion_ids, logps

    args = attnpo_config(
        tmp_path, use_vllm=True, vllm_max_model_length=128, max_completion_length=16, max_steps=2, beta=0.05
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = OneMissing(
        str(tmp_path / "model"),
        lambda completions, **kwargs: [float(i % 4 < 2) for i in range(len(completions))],
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert all(math.isfinite(loss) and loss != 0 for loss in logged(trainer, "loss"))
    # The weights that vLLM samples with follow the adapter's: its log-probs agree with the trainer's after an update.
    assert all(difference < 0.02 for difference in logged(trainer, "sampling/sampling_logp_difference/mean"))
    assert logged(trainer, "attnpo/seconds/attention")[0] > 0
