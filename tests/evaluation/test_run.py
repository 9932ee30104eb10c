"""Statistics by closed forms; runs, resume and adapters with a real tiny model on both backends."""

import json
import logging
import math
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from attn_trainers.base.config import MethodConfig
from attn_trainers.base.trainer import BaseTrainer
from attn_trainers.evaluation.run import EvaluationArguments, compare_runs, evaluate, read_records
from attn_trainers.evaluation.statistics import (
    CompletionRecord,
    default_num_samples,
    estimate,
    paired_bootstrap,
    pass_at_k,
    summarize,
    summary_table,
)
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.sampling.problems import prompt_token_ids
from attn_trainers.thinking import EndOfThinking
from attn_trainers.tiny.byte_model import build_byte_model, build_byte_tokenizer


def record(problem, sample, correct, num_tokens=10, truncated=False):
    return CompletionRecord(
        problem, sample, "", "1", correct, num_tokens, num_tokens // 2, truncated, "length" if truncated else "stop"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(build_byte_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def arguments(model, tmp_path):
    data = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{i}+{i}?", "answer": answer} for i, answer in enumerate(["0", "2", "4"])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluationArguments(
        model=model,
        data=[str(data)],
        output_dir=str(tmp_path / "run"),
        num_samples=2,
        max_completion_length=12,
        temperature=1.0,
        backend="transformers",
    )


def _path(output):
    return Path(output) / "sums.jsonl"


def records_of(arguments):
    return sorted(read_records(_path(arguments.output_dir))[0], key=lambda r: (r.problem, r.sample))


# Statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in (1, 4, 5) for c in range(n + 1) for k in range(1, n + 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_refuses_more_than_the_samples():
    with pytest.raises(ValueError, match=r"k=5 is outside 1\.\.4"):
        pass_at_k(4, 2, 5)


def test_bootstrap_standard_error_is_the_closed_form():
    values = [0.0, 0.25, 1.0, 0.5, 0.75, 1.0]
    mean = sum(values) / 6
    exact = math.sqrt(sum((v - mean) ** 2 for v in values) / 6 / 6)
    got = estimate(values, seed=1, draws=40_000)
    assert got.value == pytest.approx(mean)
    # Relative standard error of the deviation of 40,000 draws: 1/sqrt(2·40,000) = 0.35 %; four of them.
    assert got.standard_error == pytest.approx(exact, rel=0.0142)
    assert got == estimate(values, seed=1, draws=40_000)
    assert estimate([0.5]).standard_error == 0


def test_paired_bootstrap():
    first, second = [0.0, 0.5, 1.0, 0.25], [0.25, 0.75, 1.25, 0.5]
    better = paired_bootstrap(first, second, draws=999)
    assert better.difference == 0.25
    assert better.standard_error == 0  # the same difference on every problem
    assert better.interval == (0.25, 0.25)
    assert better.p_value == 2 * 1 / 1000
    same = paired_bootstrap(first, first)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)
    back = paired_bootstrap(second, first, draws=999)
    assert (back.difference, back.p_value) == (-0.25, better.p_value)
    with pytest.raises(ValueError, match="first has 4 problems and second has 3"):
        paired_bootstrap(first, second[:3])


def test_summary_of_known_records():
    records = [record(0, 0, 1.0, 10), record(0, 1, 0.0, 30, True), record(1, 0, 0.0, 20), record(1, 1, 0.0, 100, True)]
    summary = summarize("sums", records)
    assert {k: e.value for k, e in summary.pass_at.items()} == {1: 0.25, 2: 0.5}
    assert (summary.mean_tokens.value, summary.median_tokens) == (40, 25)
    assert (summary.mean_thinking_tokens.value, summary.median_thinking_tokens) == (20, 12.5)
    assert summary.truncated == 0.5
    rows = summary_table([summary, replace(summary, name="more")]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[2][:3] == ["sums", "2", "2"] and cells[2][3].startswith("25.0 ± 17.")
    assert cells[-1][:3] == ["mean", "", ""] and cells[-1][3].startswith("25.0 ± 12.")
    with pytest.raises(ValueError, match=r"\[1, 2\] samples"):
        summarize("sums", records[:3])
    with pytest.raises(ValueError, match="sample 0 twice"):
        summarize("sums", [records[0], records[0]])


def test_default_samples_are_the_papers():
    assert [default_num_samples(n) for n in ("aime24", "AIME25", "amc23", "math500", "minerva")] == [32, 32, 32, 4, 4]


# Sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("", "ab</think>c", 3),
        ("<think>\n", "abc", 3),
        ("", "<think>ab", 3),
        ("", "abc", 0),
        ("", "a</think>b</think>", 2),
    ],
)
def test_thinking_tokens(prompt, completion, expected):
    tokenizer = build_byte_tokenizer()  # a tag is one token, any other character here too
    ids = [tokenizer(text)["input_ids"] for text in (prompt, completion)]
    assert EndOfThinking(tokenizer).count_tokens(*ids) == expected


# Runs ------------------------------------------------------------------------------------------------


def test_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path):
    whole = evaluate(arguments)
    expected = records_of(arguments)
    assert [(r.problem, r.sample) for r in expected] == [(p, s) for p in range(3) for s in range(2)]
    assert all(r.truncated == (r.finish == "length") and 1 <= r.num_tokens <= 12 for r in expected)
    assert len({r.completion for r in expected}) == 6  # each completion has a seed of its own
    path = _path(arguments.output_dir)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    assert read_records(path)[1] == 1
    assert evaluate(replace(arguments, batch_size=3)) == whole
    assert records_of(arguments) == expected
    before = path.read_bytes()
    assert evaluate(arguments) == whole  # nothing is missing, nothing is drawn
    assert path.read_bytes() == before
    for name in ("report.md", "report.json", "report.png"):
        assert (path.parent / name).stat().st_size > 0


def test_more_samples_extend_a_run(arguments):
    evaluate(arguments)
    first = records_of(arguments)
    assert evaluate(replace(arguments, num_samples=4))[0].num_samples == 4
    assert [r for r in records_of(arguments) if r.sample < 2] == first
    assert evaluate(arguments)[0].num_samples == 2


def test_other_settings_or_data_are_refused(arguments):
    evaluate(arguments)
    with pytest.raises(ValueError, match=r"other settings \(temperature, seed\)"):
        evaluate(replace(arguments, temperature=0.5, seed=1))
    with open(arguments.data[0], "a") as file:
        file.write(json.dumps({"problem": "3+3?", "answer": "6"}) + "\n")
    with pytest.raises(ValueError, match=r"other settings \(data sums\)"):
        evaluate(arguments)


def test_unusable_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"pass_at=4 is outside 1\.\.2"):
        replace(arguments, pass_at=[4])
    with pytest.raises(ValueError, match="two sources of one name"):
        replace(arguments, data=arguments.data * 2)
    with pytest.raises(ValueError, match=r"no \{problem\}"):
        replace(arguments, prompt_template="Solve it.")


# The model's positions ----------------------------------------------------------------------------------


@pytest.fixture
def short_model(model, tmp_path):
    """The model as if it were made for 110 tokens; the prompts of the sums have a little over 90."""
    folder = tmp_path / "short"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 110}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_new_tokens_end_with_the_models_positions_and_the_report_says_so(arguments, short_model, caplog):
    data = Path(arguments.data[0])
    data.write_text(data.read_text() + json.dumps({"problem": "30+30?", "answer": "60"}) + "\n")
    args = replace(arguments, model=short_model, max_completion_length=None)
    prompts = [
        len(prompt_token_ids(load_tokenizer(short_model), json.loads(line)["problem"], args.prompt_template))
        for line in data.read_text().splitlines()
    ]
    with caplog.at_level(logging.WARNING, "attn_trainers.evaluation"):
        evaluate(args)
    records = records_of(args)
    assert [110 - prompts[r.problem] >= r.num_tokens for r in records] == [True] * 8
    assert any(r.num_tokens == 110 - prompts[r.problem] and r.truncated for r in records)
    note = (
        f"8 of 8 completions are limited by the 110 positions of the model: to {110 - max(prompts)} new tokens or "
        "more instead of 32768."
    )
    assert [r.getMessage() for r in caplog.records if r.name.startswith("attn_trainers.")] == [note]
    assert (Path(args.output_dir) / "report.md").read_text().endswith(f"\n\n{note}\n")
    # With fewer samples the run is complete: the count is that of the evaluation, not of what was drawn this time.
    evaluate(replace(args, num_samples=1))
    assert "\n4 of 4 completions are limited" in (Path(args.output_dir) / "report.md").read_text()


def test_a_limit_that_was_asked_for_and_does_not_fit_is_refused_before_anything_is_kept(arguments, short_model):
    longest = len(prompt_token_ids(load_tokenizer(short_model), "2+2?", arguments.prompt_template))
    args = replace(arguments, model=short_model, max_completion_length=111 - longest)
    message = (
        f"max_completion_length={111 - longest} and a prompt of {longest} tokens exceed the 110 positions of the "
    )
    message += "model; "
    with pytest.raises(
        ValueError, match=f"{message}set max_completion_length to at most {110 - longest}, or leave it out"
    ):
        evaluate(args)
    assert not Path(args.output_dir).exists()  # so that the corrected run is not refused for other settings
    evaluate(replace(args, max_completion_length=110 - longest))
    assert "limited" not in (Path(args.output_dir) / "report.md").read_text()


# The chat template -----------------------------------------------------------------------------------


def test_template_arguments_reach_the_prompt_and_are_a_setting_of_the_run(arguments, model, tmp_path):
    hybrid = tmp_path / "hybrid"
    shutil.copytree(model, hybrid)
    tokenizer = load_tokenizer(hybrid)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>' }}{% endif %}"
    tokenizer.save_pretrained(hybrid)
    plain = replace(arguments, model=str(hybrid))
    off = replace(plain, output_dir=f"{plain.output_dir}-off", chat_template_kwargs='{"enable_thinking": false}')
    for args in (plain, off):
        evaluate(args)
    # The prompt opens the thinking, and nothing closes it: all of a completion counts as thinking.
    assert all(r.num_thinking_tokens == r.num_tokens for r in records_of(off))
    assert not all(r.num_thinking_tokens == r.num_tokens for r in records_of(plain))
    with pytest.raises(ValueError, match=r"other settings \(chat_template_kwargs\)"):
        evaluate(replace(off, chat_template_kwargs=None))


def test_comparison_of_two_runs(arguments, tmp_path):
    evaluate(arguments)
    other = replace(arguments, output_dir=str(tmp_path / "longer"), max_completion_length=24)
    evaluate(other)
    quantities = compare_runs(arguments.output_dir, other.output_dir)["sums"]
    mean = [sum(r.num_tokens for r in records_of(a)) / 6 for a in (arguments, other)]
    assert quantities["tokens"].difference == pytest.approx(mean[1] - mean[0])
    assert quantities["tokens"].difference > 0
    with pytest.raises(ValueError, match="holds no evaluation"):
        compare_runs(arguments.output_dir, tmp_path / "nothing")


@pytest.fixture
def adapter(model, tmp_path):
    """An adapter that is not the identity, and the same model with it merged."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    peft_model.save_pretrained(tmp_path / "adapter")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(model).save_pretrained(tmp_path / "merged")
    return str(tmp_path / "adapter"), str(tmp_path / "merged")


def run_into(arguments, name, **changes):
    """Greedy completions of a run into a folder of its own."""
    changed = replace(
        arguments, output_dir=f"{arguments.output_dir}-{name}", temperature=0.0, num_samples=1, **changes
    )
    evaluate(changed)
    return [r.completion for r in records_of(changed)]


def test_adapter_is_applied(arguments, adapter):
    path, merged = adapter
    with_adapter = run_into(arguments, "adapter", model=path)
    assert with_adapter == run_into(arguments, "merged", model=merged)
    assert with_adapter != run_into(arguments, "base")


@pytest.mark.slow
def test_vllm_draws_what_transformers_draws_and_resumes(arguments, adapter, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    path, _ = adapter
    greedy = run_into(arguments, "transformers", model=path, dtype="float32")
    assert run_into(arguments, "vllm", model=path, dtype="float32", backend="vllm") == greedy
    # More prompt tokens than one engine step takes: on a CPU no prompt may be prefilled in chunks.
    long = tmp_path / "long" / "sums.jsonl"
    long.parent.mkdir()
    row = {"problem": "1 + " * 80 + "1?", "answer": "81"}
    long.write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    settings = {"backend": "vllm", "dtype": "float32", "data": [str(long)], "max_completion_length": 8}
    sampled = replace(arguments, **settings, output_dir=f"{arguments.output_dir}-sampled")
    whole = evaluate(sampled)
    expected = records_of(sampled)
    _path(sampled.output_dir).write_text("".join(_path(sampled.output_dir).read_text().splitlines(keepends=True)[:2]))
    assert evaluate(sampled) == whole
    assert records_of(sampled) == expected


class EvaluatingTrainer(BaseTrainer):
    config_class = MethodConfig
    metric_prefix = "plain"


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "sums"])
def test_evaluation_during_training_logs_pass_at_k(model, tmp_path, name):
    seen, thinking = {"train": [], "eval": []}, []
    tokenizer = load_tokenizer(model)
    end = tokenizer.convert_tokens_to_ids("</think>")

    def odd_sum(prompts, completion_ids, trainer_state, **kwargs):
        rewards = [float(sum(ids) % 2) for ids in completion_ids]
        seen["train" if trainer.model.training else "eval"].extend(rewards)
        if not trainer.model.training:
            for prompt, ids in zip(prompts, completion_ids, strict=True):
                closed = ids.index(end) + 1 if end in ids else len(ids)
                thinking.append(closed if prompt.endswith("<think>") or end in ids else 0)
        return rewards

    data = Dataset.from_dict({"prompt": [f"{i}+{i}?" + "<think>" * (i % 2) for i in range(8)]})
    config = MethodConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        num_generations_eval=2,
        max_completion_length=6,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    trainer = EvaluatingTrainer(
        model=model,
        reward_funcs=odd_sum,
        args=config,
        train_dataset=data,
        eval_dataset=data if name is None else {name: data},
        processing_class=tokenizer,
    )
    trainer.train()
    prefix = "eval_" if name is None else "eval_sums_"
    logs = next(entry for entry in trainer.state.log_history if f"{prefix}pass@1" in entry)
    pairs = [seen["eval"][i : i + 2] for i in range(0, 16, 2)]
    assert len(seen["eval"]) == 16
    assert logs[f"{prefix}pass@1"] == pytest.approx(sum(map(sum, pairs)) / 16)
    assert logs[f"{prefix}pass@2"] == pytest.approx(sum(map(any, pairs)) / 8)
    assert 0 < logs[f"{prefix}pass@1"] < logs[f"{prefix}pass@2"]
    assert logs[f"{prefix}completions/mean_thinking_length"] == pytest.approx(sum(thinking) / 16)
    assert sum(thinking) > 0
    others = ("pass@", "eval_pass@" if name else "eval_sums")
    assert not any(key.startswith(others) for entry in trainer.state.log_history for key in entry)
