"""Pictures of what was found, with other pairs than all and without."""

import pytest
from matplotlib import pyplot as plt

from attn_trainers.attnpo.discovery import pictures
from attn_trainers.attnpo.discovery.pictures import plot_head_map
from attn_trainers.attnpo.discovery.ranking import CriterionReport
from attn_trainers.attnpo.discovery.report import HeadReport


BASELINES = {
    "-index": [0.8, 0.7, 0.9],
    "index": [0.2, 0.1, 0.3],
    "length": [0.6, 0.5, 0.7],
    "-length": [0.4, 0.3, 0.5],
}


@pytest.mark.parametrize(
    ("criterion", "matched", "shown"), [("matched", True, "matched"), ("all", True, "matched"), ("all", False, "all")]
)
def test_every_head_stands_beside_scores_without_attention(tmp_path, monkeypatch, criterion, matched, shown):
    everything = CriterionReport(2, 3, [4], [0.1, 0.2, 0.3, 0.4], [0.0] * 4, [1.0] * 4, BASELINES)
    near = CriterionReport(1, 2, [1, 1], [0.5, 0.6, 0.7, 0.8], [0.0] * 4, [1.0] * 4, BASELINES)
    none = CriterionReport(0, 0, [0], [], [], [], {})
    criteria = {"matched": near if matched else none, "before": none, "all": everything}
    report = HeadReport("org/m", 2, 2, "macro", criterion, "", criteria, [[1, 1]], [], [], [])
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_head_map(report, [(1, 1)], tmp_path / "map.png")
    figure = kept[0]
    left, right, bar = figure.axes
    expected = criteria[criterion].sra
    assert left.images[0].get_array().tolist() == [expected[:2], expected[2:]]
    heads, chosen = right.collections[:2]
    assert heads.get_offsets().tolist() == [list(p) for p in zip(everything.sra, criteria[shown].sra, strict=True)]
    assert chosen.get_offsets().tolist() == [[0.4, criteria[shown].sra[3]]]
    assert right.get_ylabel() == f"SRA on {pictures.CRITERION_NAMES[shown]}"
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == ["heads", "chosen", *(f"score {name}" for name in BASELINES)]
    assert [line.get_ydata()[0] for line in bar.lines[-4:]] == [values[0] for values in BASELINES.values()]
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.undo()
    plt.close(figure)
