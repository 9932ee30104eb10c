"""The built wheel, installed where the repository is not: commands, recipes and accelerate configs come with it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest

from tests.helpers import ROOT, outside_environment


SOURCES = ("attn_trainers", "recipes", "accelerate_configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
SETTINGS = "--tiny_model --dataset problems.jsonl --use_vllm false --max_completion_length 16 --max_prompt_length 200 "
SETTINGS += "--num_rollouts 2 --num_branch_points 1 --rollouts_per_branch 1 --generation_batch_size 8 "
SETTINGS += "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_steps 1 --report_to none"
# One word, so that a command line can be split at its blanks.
PRINT_PLACE = "print(__import__('attn_trainers').__file__)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command of a fresh environment that has the wheel and, behind it, the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True, cwd=folder
    )
    venv.create(folder / "env", with_pip=False)
    bin_folder = folder / "env" / "bin"
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("attn_trainers-*.whl")
    install = ["--python", str(bin_folder / "python"), "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, *install, str(wheel)], check=True, cwd=folder)
    rows = [f'{{"problem": "{i} + 1", "answer": "{i + 1}"}}\n' for i in range(8)]
    (folder / "problems.jsonl").write_text("".join(rows))
    environment = {name: value for name, value in outside_environment().items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"

    def run(command: str) -> str:
        done = subprocess.run(
            [bin_folder / command.split()[0], *command.split()[1:]],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run.folder = folder
    return run


@pytest.mark.slow
def test_the_commands_of_the_wheel_need_no_repository(installed):
    place = installed(f"python -c {PRINT_PLACE}").strip()
    assert place.startswith(str(installed.folder / "env"))
    assert installed("attn-trainers --help").startswith("usage: attn-trainers COMMAND")
    report = installed(f"attn-trainers preflight --config_file cpu attnrl_1p5b {SETTINGS} --output_dir looked")
    assert "8 rows" in report
    assert sorted(path.name for path in (installed.folder / "looked").iterdir()) == ["_tiny-model"]


@pytest.mark.slow
def test_a_recipe_of_the_wheel_trains(installed):
    installed(f"attn-trainers train --config_file cpu attnrl_1p5b {SETTINGS} --output_dir run")
    assert (installed.folder / "run" / "model.safetensors").exists()
    assert "AttnRL" in (installed.folder / "run" / "README.md").read_text()
