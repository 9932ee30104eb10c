"""Cards of all trainers, and pushes of recipes to a Hub on loopback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftConfig

import attn_trainers
from attn_trainers.base.card import (
    CardNotes,
    Origin,
    evaluation_table,
    hardware,
    public_command,
    publish,
    replace_section,
    write_evaluation,
)
from attn_trainers.base.results import logged_results, summary_results
from attn_trainers.evaluation.statistics import Estimate, Summary
from attn_trainers.sampling.models import load_tokenizer
from attn_trainers.tiny.byte_model import build_byte_model
from tests.helpers import ROOT


METHOD_SETTINGS = {
    "AttnRL": {"num_rollouts": 2, "num_branch_points": 1, "rollouts_per_branch": 1, "branching": "entropy"},
    "AttnPO": {"num_generations": 4, "heads": [[0, 1], [1, 0]], "min_step_chars": 40},
    "Rhythm": {"num_generations": 4, "scheme": "local"},
}
PAPERS = {"AttnRL": "2509.26628", "AttnPO": "2602.09953", "Rhythm": "2510.13554"}


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    return build_byte_model(tmp_path_factory.mktemp("models") / "bytes")


ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def build(method: str, model: Path, output_dir: Path, peft_config: PeftConfig | None = None):
    config, trainer = (getattr(attn_trainers, f"{method}{kind}") for kind in ("Config", "Trainer"))
    args = config(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        generation_batch_size=8,
        gradient_accumulation_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
        **METHOD_SETTINGS[method],
    )
    return trainer(
        model=str(model),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": "2"}]),
        processing_class=load_tokenizer(model),
        peft_config=peft_config,
    )


def table(text: str) -> dict[str, str]:
    """First column to second of all Markdown tables."""
    rows = [line.strip("|").split("|")[:2] for line in text.splitlines() if line.startswith("|")]
    return {name.strip(): value.strip() for name, value in rows}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["AttnRL", "AttnPO", "Rhythm"])
def test_card_of_a_local_base(method, lora, byte_model, tmp_path):
    trainer = build(method, byte_model, tmp_path / "short", ADAPTER if lora else None)
    publish(trainer, CardNotes("data/problems.jsonl", "| a | b |\n|---|---|\n| 1 | 2 |", "evaluate --it"))
    card = ModelCard.load(tmp_path / "short" / "README.md")
    kind = "a LoRA adapter for" if lora else "a fine-tuned version of"
    first = f"This model is {kind} a local model, `bytes`, trained on the local file `problems.jsonl`."
    assert first in card.text.splitlines()
    assert "None" not in card.text.partition("### Settings")[0]
    assert str(byte_model) not in card.content
    assert card.data.to_dict().get("base_model") is None and card.data.to_dict().get("datasets") is None
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert set(card.data.tags) == {"generated_from_trainer", "trl", method.lower()}
    assert f"https://huggingface.co/papers/{PAPERS[method]}" in card.text and f"arXiv:{PAPERS[method]}" in card.text
    assert ("PeftModel.from_pretrained(model, name)" in card.text) == lora
    settings = table(card.text)
    for name, value in METHOD_SETTINGS[method].items():
        assert settings[name] == f"`{value}`"
    assert settings["hardware"] == f"`{hardware(1)}`"
    assert settings["rows per update"] == "`4`" and settings["updates"] == "`0`"
    if lora:
        assert (settings["LoRA rank"], settings["LoRA modules"]) == ("`4`", "`q_proj, v_proj`")
    assert "## Evaluation\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```shell\nevaluate --it\n```\n" in card.text
    versions = {line.split(":")[0] for line in card.text.splitlines() if line.startswith("- ")}
    assert {"- attn_trainers", "- trl", "- torch"} <= versions and ("- peft" in versions) == lora
    assert {p.name for p in (tmp_path / "short").glob("*.safetensors")} == {
        "adapter_model.safetensors" if lora else "model.safetensors"
    }


def test_card_of_an_adapter_that_is_no_lora(byte_model, tmp_path):
    adapter = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    trainer = build("Rhythm", byte_model, tmp_path / "short", adapter)
    trainer.create_model_card()
    settings = table(ModelCard.load(tmp_path / "short" / "README.md").text)
    assert settings["adapter"] == "`IA3`" and "LoRA rank" not in settings


def test_card_of_a_model_from_the_hubs_cache(byte_model, tmp_path):
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(byte_model)
    trainer = build("Rhythm", snapshot, tmp_path / "out", ADAPTER)
    publish(trainer, CardNotes("some-org/some-data"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("some-org/some-model", "adapter")
    assert card.data.datasets == "some-org/some-data"
    assert "https://huggingface.co/datasets/some-org/some-data" in card.text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/some-model"


def test_origin(tmp_path):
    assert Origin.of("org/model") == Origin("org/model", None, "model")
    folder = tmp_path / "step-2"
    folder.mkdir()
    assert Origin.of(str(folder)) == Origin(None, None, "step-2")
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n")
    assert Origin.of(str(folder)) == Origin(None, "org/base", "step-2")
    sentence = Origin.of(str(folder)).sentence(is_adapter=False, dataset=None)
    assert sentence == (
        "This model is a fine-tuned version of a local model, `step-2` (derived from "
        "[org/base](https://huggingface.co/org/base))."
    )
    words = Origin.of("org/model").sentence(is_adapter=True, dataset="problems made on the spot")
    assert words.startswith("This model is a LoRA adapter for [org/model]")
    assert words.endswith(", trained on problems made on the spot.")
    (folder / "README.md").write_text(f"---\nbase_model: {tmp_path}\n---\n")
    assert Origin.of(str(folder)).ancestor is None


def test_sections_are_replaced_or_added():
    text = "# A\n\n## B\n\nold\n\n```shell\n## Citations\n```\n\n### B1\n\nold too\n\n## Citations\n\nc\n"
    assert replace_section(text, "## B", "new") == "# A\n\n## B\n\nnew\n\n## Citations\n\nc\n"
    assert replace_section(text, "### B1", "new") == text.replace("old too", "new")
    added = replace_section(text, "## D", "new")
    assert added == text.replace("\n## Citations\n\nc", "\n## D\n\nnew\n\n## Citations\n\nc")
    assert replace_section(added, "## D", "new") == added
    assert replace_section("# A\n", "## D", "new") == "# A\n## D\n\nnew\n\n"


def test_evaluation_is_written_into_a_card(tmp_path):
    with pytest.raises(ValueError, match="has no README.md"):
        write_evaluation(tmp_path, "| a |", "command")
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n# A\n\n## Evaluation\n\nnone\n\n## Citations\n")
    write_evaluation(tmp_path, "| a |", "command")
    assert (tmp_path / "README.md").read_text() == (
        "---\ntags: [x]\n---\n# A\n\n## Evaluation\n\n| a |\n\n```shell\ncommand\n```\n\n## Citations\n"
    )


def test_results_become_metadata_that_the_hub_shows(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n# A\n")
    estimate = Estimate(0.4375, 0.1)
    summary = Summary("aime24", 30, 32, {1: estimate, 8: Estimate(0.75, 0.1)}, *[estimate] * 4, 0.0)
    for _ in range(2):  # a later evaluation takes the place of an earlier one
        write_evaluation(tmp_path, "| a |", "command", summary_results([summary]))
    card = ModelCard.load(tmp_path / "README.md")
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [("aime24", "pass@1", 0.4375), ("aime24", "pass@8", 0.75)]
    assert card.data.model_name == tmp_path.name and card.data.tags == ["x"] and "| a |" in card.text


def test_last_evaluation_of_the_log():
    log = [
        {"loss": 0.1},
        {"eval_aime_reward": 0.25, "eval_aime_pass@4": 0.5, "eval_aime_runtime": 3.0},
        {"eval_aime_reward": 0.5, "eval_math_reward": 1.0, "eval_math_completions/mean_thinking_length": 7.5},
    ]
    header, _, aime, math = evaluation_table(log).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "data",
        "completions/mean_thinking_length",
        "pass@4",
        "reward",
    ]
    assert [cell.strip() for cell in aime.strip("|").split("|")] == ["aime", "", "0.5", "0.5"]
    assert [cell.strip() for cell in math.strip("|").split("|")] == ["math", "7.5", "", "1"]
    assert evaluation_table([{"loss": 0.1}]) is None
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in logged_results(log)] == [("aime", "pass@4", 0.5)]


def test_public_command_holds_no_tokens_and_no_folders():
    argv = ["recipes/x.py", "--hub_token", "hf_a", "--token=hf_b", "--dataset", "/home/me/p.jsonl", "--dir=/home/me/d"]
    assert public_command(argv=argv) == "accelerate launch recipes/x.py --dataset p.jsonl --dir=d"
    assert public_command("python", ["x.py", "two words"]) == "python x.py 'two words'"


@pytest.mark.slow
def test_recipes_push_what_they_trained(environment, tmp_path):
    script = [sys.executable, str(ROOT / "tests" / "base" / "run_pushes.py"), str(ROOT), str(tmp_path)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())

    # A Hub that takes nothing leaves a whole checkpoint and says how to upload later; the same command then pushes.
    assert "storage quota exceeded" in result["refusal"] and "hf upload me/full" in result["refusal"]
    assert (result["arrived_while_refused"], result["checkpoint_after_refusal"]) == (0, "checkpoint-2")
    launches = ("second_launch", "adapter_launch", "arm_launch", "evaluation_launch", "comparison_launch")
    assert [result[name] for name in launches] == [None] * 5
    assert table(result["cards"]["me/full"])["updates"] == "`2`"

    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "training_args.bin"]
    full = ["README.md", "config.json", "generation_config.json", "model.safetensors", *tokenizer]
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors", *tokenizer]
    assert result["files"] == {
        "me/full": sorted([*full, "trees.png"]),
        "me/full@step-2": [],  # the Hub refused it; the run went on
        "me/adapter": sorted(adapter),
        "me/adapter@step-2": sorted(adapter),
        "me/arm": sorted([*full, "curve_coupled_0.jsonl", "results.jsonl", "results.md", "results.png"]),
    }
    assert (result["full_tensors"], result["adapter_tensors"]) == (27, 28)  # 2 layers; 7 linear maps each, A and B
    assert 1 <= result["full_tokens"] <= 8
    assert result["authorization"] == ["Bearer hf_secret"] and not result["secret_pushed"]
    assert (result["evaluated"], result["evaluated_revision"]) == (16, "main")
    assert re.search(r"\| problems +\| pass@1 % +\|", result["comparison"])
