"""The run over the checks: what it records, skips, ends and goes on with."""

import json

import pytest
import torch

from attn_trainers.commands.gpu_check import main
from attn_trainers.gpu_check import run as gpu_run
from attn_trainers.gpu_check.models import NEWLINES, word_tokenizer
from attn_trainers.gpu_check.registry import Check, Context, Finding, on_gpu


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")


@pytest.fixture
def context(tmp_path):
    (tmp_path / "logs").mkdir()
    return Context("cpu", smoke=True, folder=tmp_path)


@pytest.mark.parametrize(
    ("finding", "status", "goal"),
    [
        (Finding("a", 1.12, most=1.12), "pass", "at most 1.12"),
        (Finding("a", 1.13, most=1.12), "fail", "at most 1.12"),
        (Finding("a", 0.5, least=0.7, most=1.05), "fail", "at least 0.7, at most 1.05"),
        (Finding("a", float("nan"), most=1), "fail", "at most 1"),
        (Finding("a", 3.0), "measured", ""),
    ],
)
def test_a_finding_is_held_against_its_goal(finding, status, goal):
    assert (finding.status, finding.goal) == (status, goal)


def test_goals_of_a_gpu_hold_in_a_full_run_only(context):
    assert on_gpu(context, "a", 2.0, 1.0).status == "measured"
    assert on_gpu(Context("cuda", False, context.folder), "a", 2.0, 1.0).status == "fail"


def test_a_context_reaches_a_process_whole(context):
    assert Context.from_json(context.to_json()) == context


def test_checks_are_skipped_by_name(context):
    needs = Check("a", lambda context: [], 60, needs_cuda="it maps memory")
    assert gpu_run.run_check(needs, context, 1e9)["reason"] == "needs CUDA: it maps memory"
    on_card = Context("cuda", False, context.folder)
    assert "the budget of minutes is used" in gpu_run.run_check(needs, on_card, 59)["reason"]


@pytest.mark.parametrize(
    ("result", "status"),
    [
        ({"error": "OutOfMemoryError: 1 GiB"}, "fail"),
        ({"skipped": "not installed"}, "skipped"),
        ({"findings": [{"status": "pass"}, {"status": "measured"}]}, "pass"),
        ({"findings": [{"status": "pass"}, {"status": "fail"}]}, "fail"),
        ({"findings": [{"status": "measured"}]}, "measured"),
    ],
)
def test_a_record_has_the_worst_status_of_its_findings(monkeypatch, context, result, status):
    monkeypatch.setattr(gpu_run, "run_worker", lambda *_: result)
    assert gpu_run.run_check(Check("a", None, 60), context, 1e9)["status"] == status


@pytest.mark.slow
def test_a_check_that_hangs_is_ended_and_one_that_dies_is_told(context):
    check = Check("capture_sdpa", None, 60)
    assert "not done after 0 s" in gpu_run.run_worker(check, context, 0.2)["error"]
    assert "KeyError" in gpu_run.run_worker(Check("absent", None, 60), context, 120)["error"]


@no_gpu
def test_without_a_gpu_it_runs_as_a_smoke_test_only(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "Refused: smoke=False needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "capture"])
    assert stopped.value.code == 2


def test_random_tokens_have_steps():
    tokenizer = word_tokenizer(512)
    assert len(tokenizer) == 512
    texts = tokenizer.batch_decode([[i] for i in range(512)])
    assert sum("\n\n" in text for text in texts) == (512 - 4 + NEWLINES - 1) // NEWLINES
    assert tokenizer("w17 w18 ")["input_ids"] == [21, 22]


def test_a_failure_stays_told_where_there_is_no_time_to_run_it_again(tmp_path, monkeypatch):
    name = "capture_sdpa"
    monkeypatch.setattr(gpu_run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_run, "device_name", lambda: "a card")
    failed = {"status": "fail", "reason": "why", "findings": [], "seconds": 1.0}
    where = {"device": "a card", "smoke": False, "model": None}
    (tmp_path / "results.json").write_text(json.dumps({"where": where, "checks": {name: failed}}))
    args = gpu_run.GpuCheckArguments(output=str(tmp_path), only=[name, "sleep_and_wake"], budget_minutes=0.001)
    with pytest.raises(SystemExit) as ended:
        gpu_run.run(args)
    records = json.loads((tmp_path / "results.json").read_text())["checks"]
    assert ended.value.code == 1 and records[name] == failed
    assert records["sleep_and_wake"]["reason"] == gpu_run.OUT_OF_BUDGET


@no_gpu
@pytest.mark.slow
def test_a_smoke_run_measures_records_and_goes_on(capsys, tmp_path, monkeypatch):
    options = ["--smoke", "--output", str(tmp_path), "--only", "capture_sdpa", "sleep_and_wake"]
    main(options)
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "results.json").read_text())["checks"]
    assert records["capture_sdpa"]["status"] == "pass"
    error, changed = records["capture_sdpa"]["findings"]
    # With one thread some CPUs sum in the order of eager attention, and nothing is left.
    assert 0 <= error["measured"] < 1e-4 and changed["measured"] == 0
    assert records["sleep_and_wake"]["status"] == "skipped"
    assert "| capture_sdpa" in printed and printed.strip() == (tmp_path / "results.md").read_text().strip()
    monkeypatch.setattr(gpu_run, "run_worker", lambda *_: pytest.fail("what was measured is kept"))
    main(options)
    assert not (tmp_path / "models").exists()
