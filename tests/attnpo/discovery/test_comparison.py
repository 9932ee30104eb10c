"""How the ranking moved between two models."""

import json
import runpy

import pytest
import torch

from attn_trainers.attnpo.discovery.command import ComparisonArguments
from attn_trainers.attnpo.discovery.comparison import compare_heads
from attn_trainers.attnpo.discovery.ranking import CriterionReport
from attn_trainers.attnpo.discovery.report import HeadReport
from tests.helpers import ROOT


def write(folder, sra: dict[str, list[float]], chosen, criterion="matched", model="m", heads=2):
    folder.mkdir()
    criteria = {
        name: CriterionReport(1, 1, [5], values, values, values, {"-index": [0.5, 0.4, 0.6]} if values else {})
        for name, values in sra.items()
    }
    report = HeadReport(model, 2, heads, "macro", criterion, "", criteria, [], [], [], [], chosen)
    (folder / "report.json").write_text(json.dumps(report.to_dict() | {"held_out": None}))
    return folder


@pytest.fixture
def two(tmp_path):
    first = {"matched": [0.9, 0.5, 0.5, 0.6], "before": [], "all": [0.1, 0.2, 0.3, 0.4]}
    second = {"matched": [0.8, 0.6, 0.4, 0.9], "before": [0.5] * 4, "all": [0.4, 0.3, 0.2, 0.1]}
    return (
        write(tmp_path / "a", first, [[0, 0], [1, 1]], model="runs/before"),
        write(tmp_path / "b", second, [[1, 1], [0, 1]], model="runs/after"),
    )


def test_correlation_and_overlap(two):
    found = compare_heads(*two)
    x, y = torch.tensor([0.9, 0.5, 0.5, 0.6]), torch.tensor([0.8, 0.6, 0.4, 0.9])
    assert found.pearson == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), abs=1e-6)
    # Ranks 3, 0.5, 0.5, 2 and 2, 1, 0, 3.
    ranks = torch.tensor([[3.0, 0.5, 0.5, 2.0], [2.0, 1.0, 0.0, 3.0]])
    assert found.spearman == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-6)
    assert (found.criterion, found.num_shared, found.overlap) == ("matched", 1, pytest.approx(1 / 3))


def test_another_criterion_where_one_has_no_matched_pairs(two, tmp_path):
    poor = {"matched": [], "before": [0.2, 0.3, 0.1, 0.4], "all": [0.1, 0.2, 0.3, 0.4]}
    found = compare_heads(two[1], write(tmp_path / "c", poor, [[0, 0]], criterion="before"))
    assert found.criterion == "before"
    found = compare_heads(two[0], tmp_path / "c")
    assert (found.criterion, found.pearson) == ("all", pytest.approx(1.0))


def test_recipe_compares(two, tmp_path, capsys, monkeypatch):
    arguments = ["--compare", *map(str, two), "--output_dir", str(tmp_path / "moved")]
    monkeypatch.setattr("sys.argv", ["find_key_focus_heads.py", *arguments])
    runpy.run_path(str(ROOT / "recipes" / "find_key_focus_heads.py"), run_name="__main__")
    assert "1 shared, overlap 0.33" in capsys.readouterr().out
    assert (tmp_path / "moved" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "moved" / "comparison.json").read_text())["num_shared"] == 1
    with pytest.raises(ValueError, match="must be two folders"):
        ComparisonArguments(["a"])


def test_what_cannot_be_compared_is_refused(two, tmp_path):
    values = {name: [0.5] * 6 for name in ("matched", "before", "all")}
    with pytest.raises(ValueError, match="compare models of one shape"):
        compare_heads(two[0], write(tmp_path / "c", values, [[0, 0]], heads=3))
    with pytest.raises(ValueError, match="holds no report.json"):
        compare_heads(two[0], tmp_path)
