"""Step ranking accuracy, ensembles and intervals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnpo.discovery.ranking import (
    RankingTable,
    ScoredSteps,
    build_report,
    greedy_ensemble,
    ranking_table,
    step_ranking_accuracy,
    top_k_ensembles,
)


def scored(scores, labels: str) -> ScoredSteps:
    """labels: one letter a step, e(ssential), r(edundant) or - (neither)."""
    return ScoredSteps(
        torch.tensor(scores), torch.tensor([x == "e" for x in labels]), torch.tensor([x == "r" for x in labels])
    )


def all_pairs(scores, essential, redundant):
    higher = scores[:, essential][:, :, None] - scores[:, redundant][:, None, :]
    return ((higher > 0).double() + 0.5 * (higher == 0).double()).mean((1, 2))


def test_accuracy_of_a_step_order():
    one = scored([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [2.0, 9.0, 1.0, 3.0]], "e-er")
    got = step_ranking_accuracy(one.scores, one.essential, one.redundant)
    assert got.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert step_ranking_accuracy(torch.tensor([[2.0, 1.0, 1.0]]), *masks("eer")).tolist() == [0.75]


def masks(labels):
    return torch.tensor([x == "e" for x in labels]), torch.tensor([x == "r" for x in labels])


@settings(deadline=None, max_examples=100)
@given(data=st.data(), labels=st.text("er-", min_size=2, max_size=12).filter(lambda x: "e" in x and "r" in x))
def test_sorted_search_equals_all_pairs(data, labels):
    values = st.lists(st.integers(0, 5), min_size=len(labels), max_size=len(labels))
    scores = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=4))).float()
    torch.testing.assert_close(step_ranking_accuracy(scores, *masks(labels)), all_pairs(scores, *masks(labels)))


def test_random_heads_score_one_half():
    generator = torch.Generator().manual_seed(0)
    accuracies = step_ranking_accuracy(torch.rand(2000, 40, generator=generator), *masks("e" * 20 + "r" * 20))
    # Mann-Whitney: the variance of one head's accuracy is (20 + 20 + 1) / (12 · 20 · 20).
    assert accuracies.mean().item() == pytest.approx(0.5, abs=4 * (41 / 4800 / 2000) ** 0.5)
    assert accuracies.var().item() == pytest.approx(41 / 4800, rel=0.15)


def test_macro_and_micro_average():
    responses = [
        scored([[2.0, 1.0], [1.0, 2.0]], "er"),
        scored([[1.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0, 1.0]], "errr"),
        scored([[1.0, 5.0], [5.0, 1.0]], "e-"),
    ]
    table = ranking_table(responses)
    assert table.accuracies.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert table.mean().tolist() == [0.5, 0.5]
    assert table.mean("micro").tolist() == [0.25, 0.75]


def test_ensembles():
    # Head 0 is the best alone: it misses one pair of four in the first response (2 < 2.5).
    responses = [
        scored([[3.0, 2.0, 2.5, 0.0], [0.0, 5.0, 0.0, 1.0], [0.0, 0.0, 9.0, 9.0]], "eerr"),
        scored([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0]], "er"),
    ]
    assert ranking_table(responses).mean().tolist() == [0.875, 0.3125, 0.0]
    # Heads 0 and 1: (3, 7 | 2.5, 1) and (4 | 3) miss none. With head 2: (3, 7 | 11.5, 10) misses all, (4 | 4) ties.
    assert greedy_ensemble(responses, max_heads=3) == ([0, 1, 2], [0.875, 1.0, 0.25])
    assert top_k_ensembles(responses, [0, 1, 2]).tolist() == [0.875, 1.0, 0.25]
    assert top_k_ensembles(responses, [1, 2], max_heads=1).tolist() == [0.3125]
    assert greedy_ensemble(responses, candidates=[2, 1], max_heads=1) == ([1], [0.3125])


def test_bootstrap_interval_is_that_of_a_binomial():
    # 400 responses of which 300 are ranked right: the mean's deviation is sqrt(.75 · .25 / 400) = 0.02165.
    accuracies = torch.tensor([[1.0, 1.0]] * 300 + [[0.0, 1.0]] * 100, dtype=torch.float64)
    table = RankingTable(accuracies, torch.ones(400, dtype=torch.float64))
    lower, upper = table.interval(torch.Generator().manual_seed(1), samples=4000)
    assert lower[0].item() == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.005)
    assert upper[0].item() == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.005)
    assert (lower[1].item(), upper[1].item()) == (1.0, 1.0)
    again = table.interval(torch.Generator().manual_seed(1), samples=4000)
    assert torch.equal(again[0], lower) and torch.equal(again[1], upper)


def test_micro_bootstrap_weighs_pairs():
    table = RankingTable(
        torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    )
    assert table.mean("micro").tolist() == [0.75]
    lower, upper = table.interval(torch.Generator().manual_seed(0), average="micro", coverage=0.0)
    assert lower.tolist() == upper.tolist() == [0.75]


def test_report_finds_the_planted_heads():
    generator = torch.Generator().manual_seed(3)
    layers, heads, responses = 4, 3, []
    for _ in range(200):
        essential = torch.rand(12, generator=generator) < 0.4
        scores = torch.rand(layers * heads, 12, generator=generator)
        scores[7] += 0.9 * essential
        scores[10] += 0.5 * essential
        responses.append(ScoredSteps(scores, essential, ~essential))
    report = build_report(
        responses, model_name="m", num_layers=layers, num_heads=heads, generator=generator, max_heads=4
    )
    assert report.ranking[:2] == report.greedy_heads[:2] == [[2, 1], [3, 1]]
    # P(U + c > V) for uniform U, V is 1 - (1 - c)² / 2.
    assert report.sra[7] == pytest.approx(0.995, abs=0.005)
    assert report.sra[10] == pytest.approx(0.875, abs=0.02)
    assert report.count_above(0.9) == 1 and report.count_above(0.75) == 2
    assert all(low <= mean <= high for low, mean, high in zip(report.lower, report.sra, report.upper, strict=True))
    assert report.greedy_sra[0] == report.top_k_sra[0] == pytest.approx(report.sra[7])
    assert len(report.greedy_sra) == len(report.top_k_sra) == 4
    assert report.to_dict()["num_responses"] == report.num_responses <= 200


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="needs an essential and a redundant step"):
        step_ranking_accuracy(torch.ones(2, 3), *masks("ee-"))
    with pytest.raises(ValueError, match="none of 1 responses"):
        ranking_table([scored([[1.0, 2.0]], "rr")])
    with pytest.raises(ValueError, match="overlap"):
        ScoredSteps(torch.ones(1, 1), torch.tensor([True]), torch.tensor([True]))
    with pytest.raises(ValueError, match="must be"):
        ScoredSteps(torch.ones(1, 2), torch.tensor([True]), torch.tensor([False]))
    with pytest.raises(ValueError, match="average='mean'"):
        ranking_table([scored([[1.0, 2.0]], "er")]).mean("mean")
    with pytest.raises(ValueError, match="scores of 1 heads"):
        options = {"model_name": "m", "num_layers": 2, "num_heads": 2, "generator": torch.Generator()}
        build_report([scored([[1.0, 2.0]], "er")], **options)
