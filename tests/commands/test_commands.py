"""The command line of the package: its table of commands, and recipes by name."""

import importlib
import runpy
import subprocess
import sys

import pytest

from attn_trainers import commands
from attn_trainers.launch.launcher import find_accelerate_config, find_recipe, recipe_names
from tests.helpers import ROOT, refused_in_a_line


SCRIPTS = {"evaluate": "evaluate", "heads": "find_key_focus_heads", "inspect": "inspect_attention"}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_is_a_module_that_lists_its_options(name, capsys):
    try:
        importlib.import_module(commands.module_of(name)).main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    assert f"attn-trainers {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_the_recipes_of_the_tools_are_the_commands(name, script):
    names = runpy.run_path(str(ROOT / "recipes" / f"{script}.py"))
    assert names["main"] is importlib.import_module(commands.module_of(name)).main


def test_help_is_there_without_a_heavy_import():
    code = "import sys; from attn_trainers.commands import main; main(['--help']); "
    code += "print('torch' in sys.modules, 'trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "False False"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(commands.COMMANDS)


def test_no_command_and_an_unknown_one_end_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: attn-trainers COMMAND")
    with refused_in_a_line(capsys, "^Refused: 'evalute' is no command; choose from evaluate, heads"):
        commands.main(["evalute"])


def test_recipes_and_configs_have_names():
    assert {"attnrl_1p5b", "attnpo_1p5b", "rhythm_4b", "attnrl_tiny"} <= set(recipe_names())
    assert find_recipe("attnrl_1p5b").read_text() == (ROOT / "recipes" / "attnrl_1p5b.py").read_text()
    mine = ROOT / "recipes" / "attnrl_tiny.py"
    assert find_recipe(str(mine)) == mine
    assert find_accelerate_config("zero2").read_text() == (ROOT / "accelerate_configs" / "zero2.yaml").read_text()


def test_what_has_no_name_is_refused(capsys):
    with refused_in_a_line(capsys, "recipe='attnrl_2b' is no file and no name; give a file, or one of .*attnrl_1p5b"):
        commands.main(["preflight", "attnrl_2b"])
    with refused_in_a_line(capsys, "config_file='zero9' is no file and no name; .*zero2"):
        commands.main(["preflight", "--config_file", "zero9", "attnrl_1p5b"])


@pytest.mark.slow
def test_preflight_of_a_recipe_by_its_name(tmp_path, environment):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(8)))
    options = ["--tiny_model", "--dataset", str(problems), "--use_vllm", "false", "--max_completion_length", "64"]
    options += ["--generation_batch_size", "60", "--per_device_train_batch_size", "6"]
    options += ["--gradient_accumulation_steps", "5", "--output_dir", str(tmp_path / "run")]
    start = [
        sys.executable,
        "-c",
        "from attn_trainers.commands import main; main()",
        "preflight",
        "--config_file",
        "cpu",
    ]

    def preflight(*more: str):
        command = [*start, "attnrl_1p5b", *options, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)

    done = preflight()
    assert done.returncode == 0 and "Preflight" in done.stdout and "60 rows" in done.stdout
    done = preflight("--branching", "best")
    assert done.returncode == 2
    assert "Refused: branching='best' is unknown" in done.stderr
