"""A whole probe on the small model: what it samples, its files, resume and refusals."""

import json
import re

import pytest

from attn_trainers.commands.branching import main
from attn_trainers.probes import run
from attn_trainers.probes.arguments import BranchingArguments
from attn_trainers.probes.run import Probe, run_branching


FILES = ["rollouts.jsonl", "signals.jsonl", "continuations.jsonl", "disruptions.jsonl"]


def odd_sum(probe, problems, completions):
    """In place of grading: the random model writes no right answer."""
    return [float(sum(ids) % 2) for ids in completions]


@pytest.fixture
def graded_by_sums(monkeypatch):
    monkeypatch.setattr(Probe, "grade", odd_sum)


def lines_of(folder) -> dict[str, list[str]]:
    return {name: (folder / name).read_text().splitlines() for name in FILES}


@pytest.mark.slow
def test_a_probe_and_its_resume(probe_fields, graded_by_sums, tmp_path, monkeypatch):
    args = BranchingArguments(**probe_fields, disrupt=True, disrupt_steps=2)
    text = run_branching(args)
    folder = tmp_path / "out"
    assert (folder / "branching.md").read_text() == text + "\n" and (folder / "branching.png").exists()
    record = json.loads((folder / "branching.json").read_text())
    assert list(record["trees"]) == ["attention", "entropy", "random", "first_steps"]
    for name, trees in record["trees"].items():
        assert len(trees) == 3 and {tree["prompt"] for tree in trees} == {0, 1, 2}
        for tree in trees:
            assert len(tree["offsets"]) == 2 and len(tree["rewards"]) == len(tree["continuation_tokens"]) == 4
            assert tree["offsets"] == sorted(tree["offsets"]) and 0 < tree["offsets"][0] < tree["num_tokens"] <= 24
            if name == "first_steps":
                assert tree["num_agreeing"] == 2 and tree["num_fallbacks"] in (0, 1)
        mixed = sum(0 < sum([tree["correct"], *tree["rewards"]]) < 5 for tree in trees) / 3
        assert record["criteria"][name]["trees_mixed"]["value"] == pytest.approx(mixed)
        assert f"{100 * mixed:.1f} [" in text
    # Criteria that branch a rollout at one token share the continuations there.
    shared = {}
    for trees in record["trees"].values():
        for i, tree in enumerate(trees):
            if len(set(tree["offsets"])) == 2:
                for k, offset in enumerate(tree["offsets"]):
                    outcome = tree["rewards"][2 * k : 2 * k + 2], tree["continuation_tokens"][2 * k : 2 * k + 2]
                    assert shared.setdefault((i, offset), outcome) == outcome
    lines = lines_of(folder)
    assert len(lines["rollouts.jsonl"]) == len(lines["signals.jsonl"]) == 3
    assert len(lines["continuations.jsonl"]) < 4 * 3 * 4
    assert len(record["disruptions"]) == len(lines["disruptions.jsonl"]) > 0

    # Cut off in the middle of the continuations: the rest is drawn again, alike, and nothing else is.
    kept = lines["continuations.jsonl"][:7]
    (folder / "continuations.jsonl").write_text("\n".join([*kept, lines["continuations.jsonl"][7][:20]]))
    (folder / "disruptions.jsonl").unlink()
    monkeypatch.setattr(run, "read_rollout", None)
    assert run_branching(args) == text
    again = lines_of(folder)
    assert {name: sorted(one) for name, one in again.items()} == {name: sorted(one) for name, one in lines.items()}

    # Fewer problems are a part of what is there.
    monkeypatch.setattr(run.SamplingSession, "sample", lambda *_: pytest.fail("sampled"))
    assert "2 prompts, 2 rollouts" in run_branching(BranchingArguments(**probe_fields | {"num_problems": 2}))


def test_corrupted_steps_have_other_numbers_and_the_same_head(probe_fields, graded_by_sums, monkeypatch):
    probe = Probe(BranchingArguments(**probe_fields, disrupt=True, disrupt_steps=99))
    text = "17 + 3 = 20\n\n20 - 4 = 16\n\n16 + 9 = 25\n\n25 - 1 = 24"
    ids = probe.tokenizer(text)["input_ids"]
    ranges = [(0, 6), (6, 12), (12, 18), (18, len(ids))]
    signals = run.RolloutSignals(ranges, [0.0, 0.5, 0.0, 0.0], [0.0] * len(ids))
    corrupted = list(probe._corrupted(run.Rollout(0, 0, [1], ids), signals))
    assert [kind.step for _, kind, _ in corrupted] == [1, 2] and corrupted[0][1].influential
    for (_, kind, head), own in zip(corrupted, ("20 - 4 = 16", "16 + 9 = 25"), strict=True):
        start, end = ranges[kind.step]
        assert head[:start] == ids[:start] and len(head) == end
        wrong = probe.tokenizer.decode(head[start:])
        assert wrong != own + "\n\n" and re.sub(r"\d+", "#", wrong) == re.sub(r"\d+", "#", own + "\n\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "model=None and data='d': set both"),
        ({"criteria": ["attention", "depth"]}, "criteria='depth' is unknown; set it to one of attention"),
        ({"criteria": ["random", "random"]}, "is empty or has one twice; name each once"),
        ({"criteria": []}, r"criteria=\[\] is empty"),
        ({"temperature": 0.0}, "temperature=0.0 makes all continuations alike; set it above 0"),
        ({"num_branch_points": 0}, "num_branch_points=0 is out of range; set it to at least 1"),
        ({"step_mode": "words"}, "step_mode='words' is unknown; set it to one of paragraphs"),
        ({"prompt_template": "Solve."}, "has no {problem}; add it"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        BranchingArguments(**{"model": "m", "data": "d"} | fields)


def test_the_command_refuses_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "m"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "Refused: model='m' and data=None: set both.\n"
