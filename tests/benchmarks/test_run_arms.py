"""The driver of arms keeps its books over kills, and its statistics are those of closed forms."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.helpers import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script that is run from there

import arm_report  # noqa: E402
import findings  # noqa: E402
import run_arms  # noqa: E402
from studies import STUDIES, Study  # noqa: E402


# Writes a curve as a recipe does: two points; `--fail` ends it before the second.
RECIPE = """
import argparse, json, pathlib, time
parser = argparse.ArgumentParser()
for name in ("gain", "seed", "fail", "sleep", "max_generated_tokens"):
    parser.add_argument("--" + name, type=float, default=0.0)
parser.add_argument("--output_dir", type=pathlib.Path)
args = parser.parse_args()
args.output_dir.mkdir(parents=True)
with (args.output_dir / "curve.jsonl").open("a") as file:
    for tokens in (0, 100):
        accuracy = 0.4 + tokens / 100 * (args.gain + args.seed / 100)
        point = {"generated_tokens": tokens, "updates": tokens // 10, "seconds": 1.0, "accuracy": accuracy}
        point |= {"standard_error": 0.0, "mean_length": 20.0, "mean_thinking": 10.0 - tokens * args.gain / 10}
        print(json.dumps(point), file=file, flush=True)
        if args.fail:
            raise SystemExit("no")
        time.sleep(args.sleep)
"""


@pytest.fixture
def study(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    arms = {"plain": {"gain": 0.1}, "better": {"gain": 0.3}}
    return Study("Better?", str(recipe), {}, arms, against=("plain",), seeds=(0, 1, 2), budget=100)


@pytest.fixture
def run(study, tmp_path, monkeypatch):
    """Runs what a study lacks, in the test's folder; the driver."""
    monkeypatch.setattr(run_arms, "ROOT", tmp_path)
    monkeypatch.setattr(run_arms, "POLL_SECONDS", 0.02)
    lines = tmp_path / "lines.jsonl"

    def go(study=study, **chosen):
        driver = run_arms.Driver("study", study, lines, jobs=2)
        records, _ = run_arms.finished(study, run_arms.read_jsonl(lines, repair=True))
        arms, seeds = chosen.get("arms", list(study.arms)), chosen.get("seeds", list(study.seeds))
        driver.run(run_arms.to_do(study, records, arms, seeds))
        return driver

    return go


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]


def test_finished_runs_are_not_run_again_and_changed_settings_are(run, study, tmp_path):
    run(seeds=[0])
    assert {(r["arm"], r["seed"]) for r in read(tmp_path)} == {("plain", 0), ("better", 0)}
    first = read(tmp_path)[0]
    assert len(first["curve"]) == 2 and first["generated_tokens"] == 100 and set(first["versions"]) >= {"trl"}
    run()
    assert read(tmp_path)[0] == first and len(read(tmp_path)) == 6
    changed = replace(study, arms=study.arms | {"better": {"gain": 0.2}})
    run(changed)
    assert len(read(tmp_path)) == 9  # the changed arm's three seeds
    records, stale = run_arms.finished(changed, read(tmp_path))
    assert stale == 3 and [records["better"][s]["accuracy"] for s in (0, 1, 2)] == pytest.approx([0.6, 0.61, 0.62])


def test_torn_line_is_run_again(run, tmp_path):
    run()
    lines = tmp_path / "lines.jsonl"
    lines.write_text(lines.read_text()[:-20])
    assert len(run_arms.read_jsonl(lines, repair=True)) == 5
    run()
    assert len({(r["arm"], r["seed"]) for r in read(tmp_path)}) == 6


def test_failed_run_is_told_and_leaves_no_line(run, study, tmp_path, capsys):
    driver = run(replace(study, arms=study.arms | {"broken": {"fail": 1}}), seeds=[0])
    assert [job.arm for job in driver.failed] == ["broken"] and len(read(tmp_path)) == 2
    assert "no" in driver.failed[0].log.read_text()


def test_kill_leaves_the_study_locked_until_its_runs_end_and_then_goes_on(study, run, tmp_path):
    slow = replace(study, settings={"sleep": 1.5}, seeds=(0,))
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import pathlib, run_arms, studies
run_arms.ROOT = pathlib.Path({str(tmp_path)!r})
study = studies.{slow!r}
run_arms.Driver("study", study, run_arms.ROOT / "lines.jsonl", 1).run([("plain", 0), ("better", 0)])
"""
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    curve = tmp_path / "runs" / "arms" / "study" / "plain-0" / "curve.jsonl"
    while not (curve.exists() and curve.read_text()):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with pytest.raises(SystemExit, match=r"study='study' is being run, by another driver or by the last runs of one"):
        run(slow)
    while True:  # the run that the driver left behind ends, and with it the lock
        try:
            run(slow)
            break
        except SystemExit:
            time.sleep(0.1)
    assert sorted((r["arm"], r["seed"]) for r in read(tmp_path)) == [("better", 0), ("plain", 0)]


def test_settings_of_the_recipe_are_seen_and_its_comments_are_not(run, study, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE + "DEPENDENCIES = {'warmup_steps': 5}\n")
    run(seeds=[0])
    recipe.write_text(RECIPE + "# told\nDEPENDENCIES = {'warmup_steps': 5}  # why\nPANELS = {}\n")
    assert run_arms.finished(study, read(tmp_path))[1] == 0
    recipe.write_text(RECIPE + "DEPENDENCIES = {'warmup_steps': 6}\n")
    assert run_arms.finished(study, read(tmp_path)) == ({}, 2)
    recipe.write_text(RECIPE + "class Recipe:\n    warmup_steps: int = 5\nDEPENDENCIES = {'warmup_steps': 5}\n")
    assert run_arms.finished(study, read(tmp_path)) == ({}, 2)


def test_accuracy_of_a_study_with_a_budget_is_read_at_the_budget(study):
    points = [(0, 0.5), (80, 0.6), (120, 0.8)]
    record = {"accuracy": 0.8, "curve": [{"generated_tokens": t, "accuracy": a} for t, a in points]}
    assert arm_report.final_accuracy(study, record) == pytest.approx(0.7)
    assert arm_report.final_accuracy(replace(study, budget=0), record) == 0.8


def test_only_runs_from_the_same_model_are_paired():
    def run(start):
        return {"curve": [{"accuracy": start}]}

    records = {
        "a": {2: run(0.5), 0: run(0.5), 1: run(0.25)},
        "b": {0: run(0.5), 1: run(0.5), 2: run(0.5), 3: run(0.5)},
    }
    assert arm_report.paired_seeds(records, "a", "b") == [0, 2]
    assert arm_report.paired_seeds(records, "a", "c") == []


def test_report_has_the_differences_of_the_lines(run, study, tmp_path):
    run()
    records, _ = run_arms.finished(study, read(tmp_path))
    text = arm_report.write_report("study", study, records, tmp_path)
    # Equal differences have no spread, so no interval. Mean over the run: half the gain of a straight line.
    assert "better − plain" in text and "| +20.0      | –             | –" in text
    assert "accuracy after 10 updates, points" in text
    # Points at 0 and 10 updates.
    assert arm_report.curve_values(records["plain"][1], "accuracy", 5, "updates") == pytest.approx(0.4 + 0.11 / 2)
    assert arm_report.curve_mean(records["plain"][1], 100) == pytest.approx(0.4 + 0.11 / 2)
    assert arm_report.curve_mean(records["plain"][1], 50) == pytest.approx(0.4 + 0.11 / 4)
    assert (tmp_path / "study.png").stat().st_size > 20_000


def test_paired_difference_in_closed_form():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3); t with two degrees is 4.3027 at 95 %.
    d = arm_report.paired_difference([0, 0, 0], [1, 2, 3])
    assert d.mean == 2 and d.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    t = 2 * 3**0.5
    assert d.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert arm_report.paired_difference([1.0], [3.0]) == arm_report.Difference(2.0, None, None, 1)
    with pytest.raises(ValueError, match="first has 1 and second has 2 values"):
        arm_report.paired_difference([1], [1, 2])


def test_studies_name_their_own_arms_and_recipes():
    for study in STUDIES.values():
        assert (ROOT / study.recipe).exists() and set(study.against) <= set(study.arms)
        assert len({run_arms.settings_hash(study, arm) for arm in study.arms}) == len(study.arms)


def test_findings_pair_runs_of_the_same_seeds_and_draw_them(tmp_path, monkeypatch):
    def line(name, arm, seed, accuracy):
        settings = run_arms.settings_hash(STUDIES[name], arm)
        # At the budget, half way between the last two points, the accuracy is the one asked for.
        points = [(0, 0.5), (STUDIES[name].budget - 9, accuracy - 0.1), (STUDIES[name].budget + 9, accuracy + 0.1)]
        curve = [{"generated_tokens": t, "accuracy": a, "mean_thinking": 210.0} for t, a in points]
        last = accuracy + 0.1 if STUDIES[name].budget else accuracy
        return {
            "arm": arm,
            "seed": seed,
            "settings": settings,
            "accuracy": last,
            "mean_thinking": 200.0,
            "curve": curve,
        }

    lines = [
        line(name, arm, seed, accuracy)
        for name, arm, seed, accuracy in [
            ("branching", "attention", 0, 0.61),
            ("branching", "attention", 1, 0.64),
            ("branching", "attention", 2, 0.99),  # has no partner
            ("branching", "random", 0, 0.60),
            ("branching", "random", 1, 0.61),
            ("branching", "random", 100, 0.1),  # a pilot's seed
            ("length", "attnpo", 0, 0.7),
        ]
    ]
    for name in ("branching", "length"):
        mine = [json.dumps(line) + "\n" for line in lines if line["arm"] in STUDIES[name].arms]
        (tmp_path / f"{name}.jsonl").write_text("".join(mine))
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    records = findings.counted_runs("branching")
    found = findings.differences(STUDIES["branching"], records, findings.PAIRS["branching"][1])
    assert list(found) == ["attention − random"]
    # Differences 1 and 3 points: mean 2, standard error 1; t with one degree is 12.7062 at 95 %.
    d = found["attention − random"]
    assert (d.mean, d.num_pairs) == (pytest.approx(2), 2)
    assert d.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["findings.py", "--output", str(tmp_path / "findings.png")])
    findings.main()
    assert (tmp_path / "findings.png").stat().st_size > 10_000
