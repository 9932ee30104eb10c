"""A whole inspection on the small model: files, resume, refusals, and the recipe."""

import json
import subprocess
import sys

import pytest

from attn_trainers.commands import inspect
from attn_trainers.inspection import run
from attn_trainers.inspection.run import InspectionArguments, run_inspection
from attn_trainers.tiny.arithmetic import sample_problems
from attn_trainers.tiny.runs import HELD_OUT_SEED
from tests.helpers import ROOT


PICTURES = ["couplings.png", "response_1.png", "response_2.png"]


@pytest.fixture
def problems():
    return sample_problems(2, seed=3)


@pytest.fixture
def data(problems, completions, tmp_path):
    """A given completion, and a problem without."""
    records = [
        {"problem": problems[0].text, "completion": completions[0], "answer": "29"},
        {"problem": problems[1].text, "answer": problems[1].answer},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.slow
def test_recipe_reads_given_completions_and_samples_the_others(
    model_dir, tiny_tokenizer, problems, completions, data, environment, tmp_path
):
    arguments = ["--model", model_dir, "--data", data, "--output_dir", tmp_path / "out", "--max_completion_length", 20]
    arguments += ["--prompt_template", "{problem}", "--key_focus_heads", "[[1, 0]]", "--step_mode", "paragraphs"]
    command = [sys.executable, ROOT / "recipes/inspect_attention.py", *map(str, arguments)]
    done = subprocess.run(command, check=True, timeout=600, env=environment, capture_output=True, text=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*PICTURES, "couplings.md", "index.html", "responses.jsonl"])
    text = (tmp_path / "out" / "index.html").read_text()
    given = len(tiny_tokenizer(completions[0])["input_ids"])
    assert f"{given} tokens · right" in text and "20 tokens · cut off · wrong" in text
    assert problems[0].text in text
    table = (tmp_path / "out" / "couplings.md").read_text()
    assert "| entropy at WAAD peaks, nats" in table and "1 of 2 responses have no key-focus scores" in table
    assert "| entropy at WAAD peaks, nats" in done.stdout and "Perturbation" not in text


def test_tiny_inspects_held_out_problems_as_they_are(tmp_path):
    args = inspect.Arguments(tiny=True, model="m", output_dir=str(tmp_path / "out"), num_problems=3)
    tiny = inspect.tiny_arguments(args)
    assert (tiny.model, tiny.prompt_template) == ("m", "{problem}")
    held_out = sample_problems(3, HELD_OUT_SEED)
    assert run.read_problems(tiny) == [{"problem": p.text, "answer": p.answer} for p in held_out]


@pytest.mark.slow
def test_perturbed_run_and_its_resume(model_dir, data, tmp_path, monkeypatch):
    args = InspectionArguments(
        model=str(model_dir),
        data=str(data),
        output_dir=str(tmp_path / "out"),
        prompt_template="{problem}",
        max_completion_length=40,
        perturb=True,
        perturb_positions=2,
        perturb_max_tokens=10,
    )
    table = run_inspection(args)
    folder = tmp_path / "out"
    stored = folder / "perturbations.jsonl"
    lines = stored.read_text().splitlines()
    first = json.loads(lines[0])["record"]
    assert len(lines) == 2 and len(first["perturbations"]) == 4
    assert all(len(p["forced"]) == len(p["jaccards"]) == 3 for p in first["perturbations"])
    report = json.loads((folder / "perturbation.json").read_text())
    assert report["responses"] == 2 and report["continuations"] == 24
    top = [value for p in first["perturbations"] if p["top"] for value in p["jaccards"]]
    assert report["mean_jaccard"][0]["top"] == pytest.approx(sum(top) / 6)
    assert f"{report['comparison']['first']:.3f}" in table and table in _without_facts(folder)
    assert (folder / "perturbation.png").exists() and "<h2>Perturbation</h2>" in (folder / "index.html").read_text()

    # Cut off while the second response was written: that one is made again, and nothing else is.
    stored.write_text(lines[0] + "\n" + lines[1][:50])
    calls = []
    perturb = run.perturb_response
    monkeypatch.setattr(run, "perturb_response", lambda *a, **k: calls.append(a) or perturb(*a, **k))
    monkeypatch.setattr(run, "sample_with_transformers", None)
    assert run_inspection(args) == table
    assert len(calls) == 1 and stored.read_text().splitlines() == lines


def _without_facts(folder) -> str:
    """The tables of both Markdown files."""
    texts = [(folder / name).read_text().split("\n\n")[-1].rstrip() for name in ("couplings.md", "perturbation.md")]
    return "\n\n".join(texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_mode": "words"}, "step_mode='words' is unknown; set it to one of phrases"),
        ({"head_pool": "top"}, "head_pool='top' is unknown; set it to one of all, middle"),
        ({"perturb_fai_from": 5}, "perturb_fai_from=5 is unknown; set it to one of 0, 10"),
        ({"perturb_positions": 0}, "perturb_positions=0 is below 1; raise it"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative; set it to 0"),
        ({"prompt_template": "Solve."}, "prompt_template='Solve.' has no {problem}; add it"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        InspectionArguments(model="m", data="d", **fields)


def test_refused_data(tmp_path):
    with pytest.raises(ValueError, match="model='m' and data=None: set both"):
        run_inspection(InspectionArguments(model="m"))
    path = tmp_path / "data.jsonl"
    path.write_text("")
    args = InspectionArguments(model="m", data=str(path))
    with pytest.raises(ValueError, match="holds no problems; give JSON lines"):
        run.read_problems(args)
    path.write_text('{"problem": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match="no text 'problem' in record 2; give one"):
        run.read_problems(args)
