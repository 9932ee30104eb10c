"""Head discovery on small models: numbers against a direct computation, and the run from problems to heads file."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from attn_trainers.attnpo.alignment import reasoning_step_ranges
from attn_trainers.attnpo.discovery.intervention import CONDITIONS
from attn_trainers.attnpo.discovery.labels import BY_LIKELIHOOD, ESSENTIAL, REDUNDANT, read_labels
from attn_trainers.attnpo.discovery.pairs import BASELINES
from attn_trainers.attnpo.discovery.run import DiscoveryArguments, discover_heads, find_candidates
from attn_trainers.attnpo.heads import load_heads, model_fingerprint
from attn_trainers.attnpo.steps import split_paragraphs
from attn_trainers.jsonl import read_jsonl
from attn_trainers.sampling.models import load_tokenizer
from tests.helpers import ROOT


def eager_sra(model, rows: list[tuple[list[int], list[tuple[int, int]], int, list[str]]]) -> torch.Tensor:
    """(heads,) SRA by all pairs, from eager attention."""
    model.set_attn_implementation("eager")
    accuracies = []
    for ids, ranges, answer_start, labels in rows:
        attention = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions, dim=1)[0]  # (H, L, L)
        received = attention[:, answer_start:].sum(1)  # (H, L)
        scores = torch.stack([received[:, start:end].mean(-1) for start, end in ranges], dim=1)  # (H, S)
        pairs = [
            (scores[:, e] > scores[:, r]).double() + 0.5 * (scores[:, e] == scores[:, r]).double()
            for e, a in enumerate(labels)
            for r, b in enumerate(labels)
            if a == ESSENTIAL and b == REDUNDANT
        ]
        accuracies.append(torch.stack(pairs).mean(0))
    return torch.stack(accuracies).mean(0)


@pytest.fixture
def labelled_data(problems, solution_of, tmp_path) -> Path:
    path = tmp_path / "labelled.jsonl"
    labels = [ESSENTIAL, REDUNDANT, ESSENTIAL, REDUNDANT]
    lines = [{"problem": p.text, "completion": solution_of(p, 2), "labels": labels} for p in problems]
    lines[0]["label_source"] = "judge: J"
    lines.append({"problem": "1 + 1", "completion": "no steps", "labels": []})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_given_labels_lead_to_the_ranking_of_eager_attention(
    model, tokenizer, problems, solution_of, labelled_data, prompt_ids, tmp_path
):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "data": str(labelled_data), "output_dir": str(tmp_path / "out")}
    settings |= {"step_mode": "paragraphs", "prompt_template": "{problem}", "num_heads": 2, "held_out": 0.0}
    settings |= {"criterion": "all"}
    heads, report, held_out = discover_heads(DiscoveryArguments(**settings))
    rows = []
    for problem in problems:
        prompt, ids = prompt_ids(problem), tokenizer(solution_of(problem, 2))["input_ids"]
        found = reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
        ranges = [(len(prompt) + start, len(prompt) + end) for start, end in found.step_ranges]
        labels = [ESSENTIAL, REDUNDANT, ESSENTIAL, REDUNDANT]
        rows.append((prompt + ids, ranges, len(prompt) + found.answer_start, labels))
    with torch.no_grad():
        expected = eager_sra(model, rows)
    assert report.ranked_by.sra == pytest.approx(expected.tolist(), abs=1e-12)
    assert report.ranked_by.num_responses == 4 and report.ranked_by.num_pairs == [16] and held_out is None
    # Essential, redundant, essential, redundant: neighbours are (0, 1), (2, 3) and, the redundant one first, (2, 1).
    assert report.criteria["matched"].num_pairs == [8, 4]
    assert report.criteria["matched"].baselines["-index"] == [0.5, 0.5, 0.5]
    assert report.ranked_by.baselines["-index"][0] == 0.75
    best = expected.argsort(descending=True, stable=True)[:2].tolist()
    assert heads.heads == tuple(divmod(index, 2) for index in best)
    assert load_heads(tmp_path / "out" / "heads.json") == heads
    assert (heads.num_layers, heads.num_heads, heads.fingerprint) == (2, 2, model_fingerprint(model.config))
    assert (heads.step_mode, heads.criterion) == ("paragraphs", "all")
    assert heads.label_source == "given with the data; judge: J"

    # A run that was cut off goes on: what is there is taken, what is missing is made again.
    labels = tmp_path / "out" / "labels.jsonl"
    whole = labels.read_text()
    labels.write_text(whole[: whole.rfind("\n", 0, -1) + 20])  # within the last line
    scores = sorted((tmp_path / "out" / "scores").iterdir())
    scores[2].unlink()
    torch.save(torch.zeros(4, 4), scores[0])
    again, other, _ = discover_heads(DiscoveryArguments(**settings))
    assert labels.read_text() == whole and sorted((tmp_path / "out" / "scores").iterdir()) == scores
    # The scores that were there were used: all equal, so half of the pairs count for every head.
    with torch.no_grad():
        assert other.ranked_by.sra == pytest.approx(((eager_sra(model, rows[1:]) * 3 + 0.5) / 4).tolist(), abs=1e-12)
    with pytest.raises(ValueError, match=r"other settings \(step_mode\); choose another folder"):
        discover_heads(DiscoveryArguments(**(settings | {"step_mode": "phrases"})))


def test_recipe_from_problems_alone(doubtful, problems, tmp_path, capsys, monkeypatch):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))
    settings = {"model": str(doubtful), "data": str(data), "output_dir": str(tmp_path / "out"), "held_out": 0.5}
    settings |= {
        "step_mode": "paragraphs",
        "prompt_template": "{problem}",
        "max_completion_length": 64,
        "num_samples": 8,
    }
    settings |= {"backend": "transformers", "min_accuracy": 0.0, "max_responses": 20, "num_heads": 2}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["find_key_focus_heads.py", *arguments])
    runpy.run_path(str(ROOT / "recipes" / "find_key_focus_heads.py"), run_name="__main__")
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    heads, held_out = load_heads(tmp_path / "out" / "heads.json"), report["held_out"]
    completions = read_jsonl(tmp_path / "out" / "completions.jsonl")
    assert len(completions) == 32
    labelled = list(read_labels(tmp_path / "out" / "labels.jsonl"))
    assert 0 < len(labelled) <= 20
    for response in labelled:
        assert response.completion.endswith(f"</think>\\boxed{{{response.answer}}}<eos>")
        derived = next(i for i, text in enumerate(response.step_texts) if f"= {response.answer}\n" in text)
        assert set(response.labels[derived + 1 :]) <= {REDUNDANT}
    both = [r for r in labelled if ESSENTIAL in r.labels and REDUNDANT in r.labels]
    assert report["criteria"]["all"]["num_responses"] + held_out["num_responses"] == len(both)
    assert [list(pair) for pair in heads.heads] == report["ranking"][:2] == report["chosen"]
    assert all(f"| {list(pair)} " in printed for pair in heads.heads) and printed.count("| chosen ") == 2
    assert all(f"| {name} " in printed for name in BASELINES) and f"labels: {BY_LIKELIHOOD}" in printed
    assert heads.label_source == BY_LIKELIHOOD and heads.settings["min_drop"] == 0.05
    intervention = report["intervention"]
    assert 0 < intervention["num_responses"] <= 20 and set(intervention["drops"]) == set(CONDITIONS)
    assert f"chosen heads {held_out['chosen']:.3f} ({held_out['lower']:.3f}-{held_out['upper']:.3f})" in printed
    assert 0.0 <= held_out["lower"] <= held_out["chosen"] <= held_out["upper"] <= 1.0
    for name in ("head_map.png", "ensembles.png", "intervention.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_given_completions_are_graded(doubtful, problems, solution_of, tmp_path, capsys):
    lines = [{"problem": p.text, "answer": p.answer, "completion": solution_of(p, 2)} for p in problems]
    lines[0]["completion"] = solution_of(problems[0], 2, wrong=True)
    lines[1] |= {"correct": False}  # what the data says gives way to the grading
    lines.append({"problem": problems[0].text, "completion": solution_of(problems[0], 2), "labels": [None] * 4})
    lines.append(lines[-1] | {"correct": False})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    args = DiscoveryArguments(
        str(doubtful), str(data), str(tmp_path / "out"), step_mode="paragraphs", prompt_template="{problem}"
    )
    (tmp_path / "out" / "scores").mkdir(parents=True)
    found = find_candidates(args, load_tokenizer(doubtful), tmp_path / "out")
    assert [one.problem for one in found] == [p.text for p in problems[1:]] + [problems[0].text]
    assert "4 of 6 given completions are used, 2 wrong ones left out (4 were graded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no JSON object"),
        (['{"answer": "1"}'], "needs lines with a problem"),
        (['{"problem": "1 + 1"}'], "lines without answer"),
        (['{"problem": "1 + 1", "completion": "2</think>2"}'], "neither labels nor answer"),
        (['{"problem": "1", "completion": "2", "answer": "2"}'], "none of 1 correct responses.*no_end_of_thinking"),
        (['{"problem": "1", "completion": "1\\n\\n1</think>1", "labels": [null]}'], "1 labels for the 2 steps"),
        (['{"problem": "1", "completion": "1\\n\\n1</think>1", "answer": "3"}'], "leads to no correct response"),
    ],
)
def test_data_that_cannot_be_used_is_refused(doubtful, tmp_path, lines, message):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        discover_heads(DiscoveryArguments(str(doubtful), str(data), str(tmp_path / "out"), step_mode="paragraphs"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "best"}, "selection='best'.*top_k, greedy"),
        ({"num_heads": 0}, "num_heads=0 is out of range; set it to at least 1"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"criterion": "near"}, "criterion='near' is unknown"),
        ({"max_change": 0.5}, "max_change=0.5 must be at least 0 and below min_drop=0.05"),
        ({"intervention_responses": -1}, "intervention_responses=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiscoveryArguments("model", "data.jsonl", **options)
