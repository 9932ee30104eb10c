"""The recipe for `uv run`: its inline metadata, and that it starts."""

import configparser
import re
import runpy
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers import ROOT


RECIPE = ROOT / "recipes" / "attnrl_uv.py"


def test_the_metadata_names_this_package_as_it_is():
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", RECIPE.read_text())
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert metadata["requires-python"] == setup["options"]["python_requires"]
    (requirement,) = map(Requirement, metadata["dependencies"])
    assert requirement.name == setup["metadata"]["name"]
    assert requirement.extras <= set(setup["options.extras_require"])


@pytest.mark.slow
def test_it_looks_at_its_settings(tmp_path, monkeypatch, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(8)))
    command = f"{RECIPE} --preflight --tiny_model --dataset {problems} --use_vllm false --max_completion_length 64 "
    command += f"--lora_target_modules all-linear --output_dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(RECIPE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "240 rows = 8 prompts x 30, trained on in 10 updates" in " ".join(printed.split())
    assert "in the adapter are trained" in printed
