"""Head discovery on small models: numbers against a direct computation, and the run from problems to heads file."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from attn_trainers.attnpo.alignment import reasoning_step_ranges
from attn_trainers.attnpo.discovery.labels import ESSENTIAL, REDUNDANT, read_labels
from attn_trainers.attnpo.discovery.probing import Candidate, answer_logps, label_steps, removal_drops
from attn_trainers.attnpo.discovery.ranking import ScoredSteps
from attn_trainers.attnpo.discovery.run import DiscoveryArguments, discover_heads, measure_held_out, read_jsonl
from attn_trainers.attnpo.heads import load_heads
from attn_trainers.attnpo.steps import split_paragraphs
from tests.helpers import ROOT


def prompt_ids(tokenizer, problem) -> list[int]:
    return tokenizer(problem.text + "<think>")["input_ids"]


@pytest.fixture
def candidate(tokenizer, problems, solution_of) -> Candidate:
    problem = problems[0]
    ids = tokenizer(solution_of(problem, 2))["input_ids"]
    return Candidate(
        problem.text, problem.answer, ids, reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
    )


def direct_logp(model, ids: list[int], count: int) -> float:
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[-count - 1 + i, token].item() for i, token in enumerate(ids[-count:]))


@torch.no_grad()
def test_answer_likelihood_and_drops_agree_with_single_forwards(model, tokenizer, problems, candidate):
    prompt = prompt_ids(tokenizer, problems[0])
    sequences = [
        prompt + candidate.completion_ids,
        candidate.completion_ids[5:],
        prompt + candidate.completion_ids[9:],
    ]
    expected = [direct_logp(model, ids, 4) for ids in sequences]
    assert answer_logps(model, sequences, 4, batch_size=2) == pytest.approx(expected, abs=1e-4)

    # The first three of four steps: the last one is left out throughout.
    ids, ranges = candidate.completion_ids, candidate.alignment.step_ranges
    tail = ids[ranges[-1][1] :]
    assert tokenizer.decode(tail) == f"</think>\\boxed{{{problems[0].answer}}}<eos>"
    whole = direct_logp(model, prompt + ids[: ranges[2][1]] + tail, 4)
    without = [direct_logp(model, prompt + ids[:s] + ids[e : ranges[2][1]] + tail, 4) for s, e in ranges[:3]]
    drops = removal_drops(model, prompt, candidate, 3, batch_size=3)
    assert drops == pytest.approx([whole - one for one in without], abs=1e-4)


def test_repetitions_behind_the_answer_are_redundant(doubtful, tokenizer, problems, candidate):
    model = Qwen2ForCausalLM.from_pretrained(doubtful)
    # Steps: first result, its re-check, the answer, its re-check.
    labels = label_steps(model, prompt_ids(tokenizer, problems[0]), candidate, batch_size=4)
    assert labels[3] == REDUNDANT
    drops = removal_drops(model, prompt_ids(tokenizer, problems[0]), candidate, 3, batch_size=4)
    largest = max(range(3), key=lambda i: drops[i])
    assert [label == ESSENTIAL for label in labels] == [i == largest and drops[i] >= 1.0 for i in range(4)]
    assert [label == REDUNDANT for label in labels[:3]] == [drop <= 0.1 for drop in drops]


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
    lines.append({"problem": "1 + 1", "completion": "no steps", "labels": []})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_given_labels_lead_to_the_ranking_of_eager_attention(
    model, tokenizer, problems, solution_of, labelled_data, tmp_path
):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "data": str(labelled_data), "output": str(tmp_path / "out")}
    settings |= {"step_mode": "paragraphs", "prompt_template": "{problem}", "num_heads": 2, "held_out": 0.0}
    heads, report, held_out = discover_heads(DiscoveryArguments(**settings))
    rows = []
    for problem in problems:
        prompt, ids = prompt_ids(tokenizer, problem), tokenizer(solution_of(problem, 2))["input_ids"]
        found = reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
        ranges = [(len(prompt) + start, len(prompt) + end) for start, end in found.step_ranges]
        labels = [ESSENTIAL, REDUNDANT, ESSENTIAL, REDUNDANT]
        rows.append((prompt + ids, ranges, len(prompt) + found.answer_start, labels))
    with torch.no_grad():
        expected = eager_sra(model, rows)
    assert report.sra == pytest.approx(expected.tolist(), abs=1e-12)
    assert report.num_responses == 4 and report.num_pairs == 16 and held_out is None
    best = expected.argsort(descending=True, stable=True)[:2].tolist()
    assert heads.heads == tuple(divmod(index, 2) for index in best)
    assert load_heads(tmp_path / "out" / "heads.json") == heads

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
        assert other.sra == pytest.approx(((eager_sra(model, rows[1:]) * 3 + 0.5) / 4).tolist(), abs=1e-12)
    with pytest.raises(ValueError, match=r"other settings \(step_mode\); choose another folder"):
        discover_heads(DiscoveryArguments(**(settings | {"step_mode": "phrases"})))


def test_held_out_responses_measure_the_chosen_heads():
    essential, redundant = torch.tensor([True, False]), torch.tensor([False, True])
    # Head 0 ranks 3 of 4 responses right, head 1 none, head 2 all; heads 0 and 1 together as head 0.
    scores = [torch.tensor([[right, 1.0 - right], [0.1, 0.3], [1.0, 0.0]]) for right in (1.0, 1.0, 1.0, 0.0)]
    responses = [ScoredSteps(one, essential, redundant) for one in scores]
    report = measure_held_out(responses, [0, 1], "macro", torch.Generator().manual_seed(0))
    assert (report.num_responses, report.chosen, report.best_single, report.median) == (4, 0.75, 0.75, 0.75)
    assert report.lower < 0.75 < report.upper == 1.0
    assert report.share_below == pytest.approx(1 / 3)
    one_kind = [ScoredSteps(scores[0], essential, torch.zeros(2, dtype=torch.bool))]
    assert measure_held_out(one_kind, [0], "macro", torch.Generator()) is None


def test_recipe_from_problems_alone(doubtful, problems, tmp_path, capsys):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))
    settings = {"model": str(doubtful), "data": str(data), "output": str(tmp_path / "out"), "held_out": 0.5}
    settings |= {"step_mode": "paragraphs", "prompt_template": "{problem}", "max_new_tokens": 64, "num_samples": 8}
    settings |= {"backend": "transformers", "min_accuracy": 0.0, "max_responses": 20}
    recipe = runpy.run_path(str(ROOT / "recipes" / "find_key_focus_heads.py"))
    recipe["main"](DiscoveryArguments(**settings))
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
    assert report["num_responses"] + held_out["num_responses"] == len(both)
    assert [list(pair) for pair in heads.heads] == report["ranking"][:3]
    assert all(f"{list(pair)}  SRA" in printed for pair in heads.heads) and printed.count("(chosen)") == 3
    assert f"chosen heads {held_out['chosen']:.3f} ({held_out['lower']:.3f}-{held_out['upper']:.3f})" in printed
    assert 0.0 <= held_out["lower"] <= held_out["chosen"] <= held_out["upper"] <= 1.0
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in ("head_map.png", "ensembles.png"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no JSON object"),
        (['{"answer": "1"}'], "needs lines with a problem"),
        (['{"problem": "1 + 1"}'], "lines without answer"),
        (['{"problem": "1 + 1", "completion": "2</think>2"}'], "neither labels nor answer"),
        (['{"problem": "1", "completion": "2", "answer": "2"}'], "none of 1 correct responses.*no_end_of_thinking"),
        (['{"problem": "1", "completion": "1\\n\\n1</think>1", "labels": [null]}'], "1 labels for the 2 steps"),
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
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiscoveryArguments("model", "data.jsonl", **options)
