"""The report of a discovery."""

import json

import pytest
import torch

from attn_trainers.attnpo.discovery.intervention import InterventionReport
from attn_trainers.attnpo.discovery.pairs import ScoredSteps
from attn_trainers.attnpo.discovery.report import HeadReport, build_report


def test_report_finds_the_planted_heads():
    generator = torch.Generator().manual_seed(3)
    layers, heads, responses = 4, 3, []
    for index in range(200):
        essential = torch.rand(12, generator=generator) < 0.4
        scores = torch.rand(layers * heads, 12, generator=generator)
        scores[7] += 0.9 * essential
        scores[10] += 0.5 * essential
        responses.append(ScoredSteps(scores, essential, ~essential, torch.ones(12), str(index), 12))
    report = build_report(
        responses, model_name="m", num_layers=layers, num_heads=heads, generator=generator, max_heads=4
    )
    assert report.ranking[:2] == report.greedy_heads[:2] == [[2, 1], [3, 1]]
    assert (report.criterion, report.note) == ("matched", "")
    # P(U + c > V) for uniform U, V is 1 - (1 - c)² / 2, whatever pairs are compared.
    for used in report.criteria.values():
        assert used.sra[7] == pytest.approx(0.995, abs=0.005)
        assert used.sra[10] == pytest.approx(0.875, abs=0.02)
        assert all(low <= mean <= high for low, mean, high in zip(used.lower, used.sra, used.upper, strict=True))
        # Steps of one length tie in every pair.
        assert used.baselines["length"] == used.baselines["-length"] == [0.5, 0.5, 0.5]
    assert report.count_above(0.9) == 1 and report.count_above(0.75) == 2
    assert report.greedy_sra[0] == report.top_k_sra[0] == pytest.approx(report.ranked_by.sra[7])
    assert len(report.greedy_sra) == len(report.top_k_sra) == 4
    report.chosen = [[2, 1]]
    report.intervention = InterventionReport(2, 1, {"chosen, high": [0.1, 0.0, 0.2]}, {"chosen, high": 0.5}, [0.1] * 3)
    record = json.loads(json.dumps(report.to_dict() | {"held_out": None}))
    assert HeadReport.from_dict(record) == report


def test_scores_of_another_model_are_refused():
    essential = torch.tensor([True, False])
    one = ScoredSteps(torch.ones(1, 2), essential, ~essential, torch.ones(2), "p")
    with pytest.raises(ValueError, match="scores of 1 heads"):
        build_report([one], model_name="m", num_layers=2, num_heads=2, generator=torch.Generator())
