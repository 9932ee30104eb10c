"""The comparison of schemes runs, goes on where it was cut off, and reports what its lines say."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from tests.helpers import ROOT


RECIPE = ROOT / "recipes" / "rhythm_tiny.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("rhythm_tiny", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rhythm_tiny"] = module  # its config is pickled with the model
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_comparison_is_resumable_and_reports_paired_differences(recipe, tmp_path):
    script = {
        "cache_dir": str(tmp_path / "cache"),
        "num_operations": 2,
        "warm_start_steps": 3,
        "num_train_problems": 40,
        "num_eval_problems": 6,
        "num_eval_samples": 2,
        "seeds": [0, 1],
    }
    args = recipe.Recipe(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=16, max_completion_length=24, logging_steps=1
    )
    recipe.main(recipe.Comparison(**script, arms=["none", "coupled_v1"]), args)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [(r["arm"], r["seed"]) for r in map(json.loads, lines)] == [
        ("none", 0), ("coupled_v1", 0), ("none", 1), ("coupled_v1", 1)
    ]  # fmt: skip
    assert all(len(json.loads(line)["rewards"]) == 2 for line in lines)
    recipe.main(recipe.Comparison(**script, arms=["none", "coupled_v1", "random"]), args)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").exists() and "coupled_v1" in card  # the table is in the card
    more = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert more[:4] == lines and [json.loads(line)["arm"] for line in more[4:]] == ["random", "random"]
    table = (tmp_path / "out" / "results.md").read_text()
    accuracies = {(r["arm"], r["seed"]): r["accuracy"] for r in map(json.loads, more)}
    differences = [accuracies["coupled_v1", seed] - accuracies["none", seed] for seed in (0, 1)]
    assert recipe.mean_and_error(differences) in next(line for line in table.splitlines() if "coupled_v1" in line)
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000


def test_mean_and_error(recipe):
    assert recipe.mean_and_error([0.4, 0.5, 0.6]) == f"50.0 ± {100 * np.std([0.4, 0.5, 0.6], ddof=1) / 3**0.5:.1f}"
    assert recipe.mean_and_error([0.4]) == "40.0"


def test_unknown_arms_are_refused(recipe):
    with pytest.raises(ValueError, match=r"arms=\['sideways'\] are unknown; choose from none, random"):
        recipe.Comparison(arms=["none", "sideways"])
