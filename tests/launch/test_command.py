"""Refusals of the evaluation recipe: one line on stderr and exit code 2, whatever is wrong."""

import json
import runpy
import sys

import pytest

from attn_trainers.tiny.byte_model import build_byte_model
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_byte_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    return path


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs the recipe with these options; its exit code and what it printed."""

    def run(*options):
        recipe = str(ROOT / "recipes" / "evaluate.py")
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, options)])
        code = 0
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_right_command_evaluates(evaluate, model, data, tmp_path):
    options = ["--model", model, "--data", data, "--output_dir", tmp_path / "out", "--num_samples", 1]
    options += [
        "--max_completion_length",
        3,
        "--backend",
        "transformers",
        "--chat_template_kwargs",
        '{"enable_thinking": false}',
    ]
    code, out, _ = evaluate(*options)
    assert code == 0 and "| sums | 1 | 1 |" in " ".join(out.split())
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["chat_template_kwargs"] == {
        "enable_thinking": False
    }


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--num_sample", "2"], "Refused: unknown option --num_sample 2"),
        (["stray"], "Refused: unknown option stray"),
        (["--num_samples", "two"], "Refused: argument --num_samples/--num-samples: invalid int value: 'two'"),
        (["--backend", "sglang"], "Refused: argument --backend: invalid choice: 'sglang'"),
        (["--temperature", "-1"], "Refused: temperature=-1.0 is negative; use 0 for greedy decoding."),
        (["--data", "absent.jsonl"], "Refused: dataset='absent.jsonl' does not exist; give the path"),
        (["--model", "absent/model"], "Refused: model='absent/model' cannot be read ("),
        (["--chat_template_kwargs", "no"], "Refused: chat_template_kwargs='no' is no JSON object; set it"),
        (["--compare", "absent", "absent"], "Refused: compare: 'absent' holds no evaluation; give the output folder"),
    ],
)
def test_a_wrong_command_is_refused_in_a_line(evaluate, model, data, tmp_path, options, line):
    base = {"--model": model, "--data": data, "--output_dir": tmp_path / "out", "--max_completion_length": 3}
    base = [part for name, value in base.items() if name != options[0] for part in (name, value)]
    code, out, err = evaluate(*base, *options)
    # The libraries may have put their own lines before; the refusal is the last, and one.
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith(line)
    assert sum("Refused" in one for one in err.splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()
