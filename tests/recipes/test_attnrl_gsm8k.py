"""The three settings of the GSM8K recipe have as many leaves, yield to the command line, and launch."""

import importlib.util
import json
import sys

import pytest

from tests.helpers import ROOT


SCRIPT = ROOT / "recipes" / "attnrl_gsm8k.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("attnrl_gsm8k", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["attnrl_gsm8k"] = module
    spec.loader.exec_module(module)
    return module


def test_settings_have_eight_leaves_each_and_yield_to_given_fields(recipe):
    made = {name: recipe.Recipe(setting=name, use_cpu=True, bf16=False) for name in recipe.SETTINGS}
    assert {args.num_generations for args in made.values()} == {8}
    assert {args.updates_per_batch for args in made.values()} == {4}
    assert [args.branching for args in made.values()] == ["random", "entropy", "attention"]
    assert [args.off_policy for args in made.values()] == [False, False, True]
    assert made["grpo"].output_dir == "runs/attnrl_gsm8k/grpo"
    given = recipe.Recipe(setting="treerl", off_policy=True, num_rollouts=2, use_cpu=True, bf16=False)
    assert given.off_policy and given.num_generations == 4 and given.expansion == "uniform"
    with pytest.raises(ValueError, match="setting='ppo'"):
        recipe.Recipe(setting="ppo", use_cpu=True, bf16=False)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["grpo", "treerl", "attnrl"])
def test_setting_launches(launch, tmp_path, setting):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n} + {n}", "answer": str(2 * n)}) + "\n" for n in range(9)))
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "generation_batch_size": 16}
    sizes |= {"max_steps": 1, "logging_steps": 1, "max_completion_length": 24, "save_steps": 1}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    where = ["--dataset", data, "--output_dir", tmp_path / "out", "--setting", setting]
    launch("cpu", SCRIPT, "--tiny_model", "--use_vllm", "false", "--report_to", "none", *where, *options)
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    pipeline = json.loads((tmp_path / "out" / "checkpoint-1" / "attnrl_state.json").read_text())
    # 2 prompts of 8 rollouts; trees of 4 rollouts, and their branches.
    assert pipeline["counters"]["samples"] >= 8 and pipeline["counters"]["generated_tokens"] > 0
