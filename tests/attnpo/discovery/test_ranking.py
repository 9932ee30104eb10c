"""Step ranking accuracy over responses, its intervals, the choice of the criterion, ensembles."""

import pytest
import torch

from attn_trainers.attnpo.discovery.pairs import ScoredSteps
from attn_trainers.attnpo.discovery.ranking import (
    CriterionReport,
    RankingOptions,
    RankingTable,
    choose_criterion,
    criterion_report,
    greedy_ensemble,
    ranking_table,
    top_k_ensembles,
)


def scored(scores, labels: str, problem: str = "p") -> ScoredSteps:
    """labels: one letter a step, e(ssential), r(edundant) or - (neither)."""
    essential, redundant = (torch.tensor([one == kind for one in labels]) for kind in "er")
    return ScoredSteps(torch.tensor(scores), essential, redundant, torch.ones(len(labels)), problem)


def all_pairs_sra(responses):
    return ranking_table(responses).mean()


def test_accuracy_of_a_step_order():
    one = scored([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], [2.0, 9.0, 1.0, 3.0]], "e-er")
    assert all_pairs_sra([one]).tolist() == [1.0, 0.0, 0.5, 0.0]
    assert all_pairs_sra([scored([[2.0, 1.0, 1.0]], "eer")]).tolist() == [0.75]


def test_random_heads_score_one_half():
    generator = torch.Generator().manual_seed(0)
    one = scored(torch.rand(2000, 40, generator=generator).tolist(), "e" * 20 + "r" * 20)
    accuracies = all_pairs_sra([one])
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
    assert table.accuracies[:, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert table.mean().tolist() == [0.5, 0.5]
    assert table.mean("micro").tolist() == [0.25, 0.75]


def test_both_orders_weigh_alike():
    # Essential first: three responses, right in 1 of 3. Redundant first: one response, right.
    responses = [scored([[2.0, 1.0]], "er"), scored([[1.0, 2.0]], "er"), scored([[1.0, 2.0]], "er")]
    responses.append(scored([[1.0, 2.0]], "re"))
    table = ranking_table(responses, "matched")
    assert table.pairs_by_group == [3, 1]
    assert table.mean().tolist() == table.mean("micro").tolist() == [pytest.approx((1 / 3 + 1) / 2)]
    one_order = criterion_report(responses[:3], "matched", RankingOptions(), torch.Generator())
    assert (one_order.num_pairs, one_order.sra, one_order.baselines) == ([3, 0], [], {})


def test_ensembles():
    # Head 0 is the best alone: it misses one pair of four in the first response (2 < 2.5).
    responses = [
        scored([[3.0, 2.0, 2.5, 0.0], [0.0, 5.0, 0.0, 1.0], [0.0, 0.0, 9.0, 9.0]], "eerr"),
        scored([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0]], "er"),
    ]
    assert all_pairs_sra(responses).tolist() == [0.875, 0.3125, 0.0]
    # Heads 0 and 1: (3, 7 | 2.5, 1) and (4 | 3) miss none. With head 2: (3, 7 | 11.5, 10) misses all, (4 | 4) ties.
    assert greedy_ensemble(all_pairs_sra, responses, [0, 1, 2]) == ([0, 1, 2], [0.875, 1.0, 0.25])
    assert top_k_ensembles(all_pairs_sra, responses, [0, 1, 2]) == [0.875, 1.0, 0.25]
    assert top_k_ensembles(all_pairs_sra, responses, [1, 2], max_heads=1) == [0.3125]
    assert greedy_ensemble(all_pairs_sra, responses, [2, 1], max_heads=1) == ([1], [0.3125])


def table_of(accuracies: list, problems=None, num_pairs=None) -> RankingTable:
    accuracies = torch.tensor(accuracies, dtype=torch.float64)[:, None]
    number = len(accuracies)
    return RankingTable(
        accuracies,
        torch.ones(number, 1, dtype=torch.float64) if num_pairs is None else num_pairs,
        torch.arange(number) if problems is None else problems,
    )


def test_bootstrap_interval_is_that_of_a_binomial():
    # 400 responses of which 300 are ranked right: the mean's deviation is sqrt(.75 · .25 / 400) = 0.02165.
    table = table_of([[1.0, 1.0]] * 300 + [[0.0, 1.0]] * 100)
    lower, upper = table.interval(torch.Generator().manual_seed(1), samples=4000)
    assert lower[0].item() == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.005)
    assert upper[0].item() == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.005)
    assert (lower[1].item(), upper[1].item()) == (1.0, 1.0)
    again = table.interval(torch.Generator().manual_seed(1), samples=4000)
    assert torch.equal(again[0], lower) and torch.equal(again[1], upper)


def test_responses_of_a_problem_are_drawn_together():
    # The 400 responses are 4 to each of 100 problems, all 4 alike: the deviation is that of 100, twice as large.
    table = table_of([[1.0]] * 300 + [[0.0]] * 100, problems=torch.arange(400) // 4)
    lower, upper = table.interval(torch.Generator().manual_seed(1), samples=4000)
    assert lower[0].item() == pytest.approx(0.75 - 1.96 * 0.0433, abs=0.011)
    assert upper[0].item() == pytest.approx(0.75 + 1.96 * 0.0433, abs=0.011)


def test_micro_bootstrap_weighs_pairs():
    table = table_of([[1.0], [0.0]], num_pairs=torch.tensor([[3.0], [1.0]], dtype=torch.float64))
    assert table.mean("micro").tolist() == [0.75]
    lower, upper = table.interval(torch.Generator().manual_seed(0), average="micro", coverage=0.0)
    assert lower.tolist() == upper.tolist() == [0.75]


def reports(matched: list[int], before: int, everything: int) -> dict[str, CriterionReport]:
    def report(counts):
        known = min(counts) > 0
        baselines = {"-index": [0.88, 0.8, 0.9], "length": [0.6, 0.5, 0.7]} if known else {}
        return CriterionReport(1, 1, counts, *[[0.5] * known] * 3, baselines)

    return {"matched": report(matched), "before": report([before]), "all": report([everything])}


def test_the_criterion_falls_back_and_says_so():
    options = RankingOptions(min_pairs=10)
    assert choose_criterion(reports([10, 10], 20, 50), options) == ("matched", "")
    name, note = choose_criterion(reports([40, 9], 20, 50), options)
    assert name == "before" and "there are 40 + 9; 10 of each order" in note and "'-index'" in note and "0.880" in note
    assert choose_criterion(reports([40, 9], 9, 50), options)[0] == "all"
    assert choose_criterion(reports([40, 0], 0, 5), options)[0] == "all"
    assert choose_criterion(reports([40, 9], 20, 50), RankingOptions(criterion="matched"))[0] == "matched"
    with pytest.raises(ValueError, match=r"criterion='matched' has \[40, 0\] pairs"):
        choose_criterion(reports([40, 0], 20, 50), RankingOptions(criterion="matched"))
    with pytest.raises(ValueError, match="no response has both an essential and a redundant step"):
        choose_criterion(reports([0, 0], 0, 0), options)


def test_what_cannot_be_ranked_is_refused():
    for criterion, counts in (("matched", [0, 0]), ("before", [0]), ("all", [0])):
        none = criterion_report([scored([[1.0, 2.0]], "rr")], criterion, RankingOptions(), torch.Generator())
        assert (none.num_responses, none.num_problems, none.num_pairs, none.sra) == (0, 0, counts, [])
    for options, message in (
        ({"average": "mean"}, "average='mean'"),
        ({"criterion": "near"}, "criterion='near'"),
        ({"match_distance": 0.0}, "match_distance=0.0"),
        ({"min_pairs": 0}, "min_pairs=0"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingOptions(**options)
