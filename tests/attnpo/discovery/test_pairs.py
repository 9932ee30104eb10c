"""Which pairs are compared, and that position cannot win the criterion heads are ranked by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnpo.discovery.labels import (
    ESSENTIAL,
    REDUNDANT,
    LikelihoodThresholds,
    label_after_answer,
    label_by_likelihood,
)
from attn_trainers.attnpo.discovery.pairs import BASELINES, ScoredSteps, baseline_scores, pair_accuracy, step_pairs
from attn_trainers.attnpo.discovery.ranking import RankingOptions, choose_criterion, criterion_report, ranking_table


def steps_of(labels: str, scores=None, derivation=None, problem="p") -> ScoredSteps:
    """labels: one letter a step, e(ssential), r(edundant) or - (neither)."""
    essential, redundant = (torch.tensor([one == kind for one in labels]) for kind in "er")
    scores = torch.zeros(1, len(labels)) if scores is None else scores
    return ScoredSteps(scores, essential, redundant, torch.arange(1, len(labels) + 1), problem, derivation)


def as_sets(groups):
    return [set(zip(first.tolist(), second.tolist(), strict=True)) for first, second in groups]


def test_pairs_of_the_criteria():
    response = steps_of("ererr", derivation=2)
    everything = {(0, 1), (0, 3), (0, 4), (2, 1), (2, 3), (2, 4)}
    assert as_sets(step_pairs(response, "all")) == [everything]
    assert as_sets(step_pairs(response, "matched")) == [{(0, 1), (2, 3)}, {(2, 1)}]
    assert as_sets(step_pairs(response, "matched", 0.4)) == [{(0, 1), (2, 3), (2, 4)}, {(2, 1)}]
    assert as_sets(step_pairs(response, "before")) == [{(0, 1)}]
    assert as_sets(step_pairs(steps_of("ererr", derivation=5), "before")) == [everything]
    assert as_sets(step_pairs(steps_of("ererr"), "before")) == [set()]
    with pytest.raises(ValueError, match="criterion='near' is unknown"):
        step_pairs(response, "near")


def test_position_has_one_half_on_the_example():
    response = steps_of("ererr")
    table = ranking_table([response.with_scores(baseline_scores(response))], "matched")
    assert table.num_pairs.tolist() == [[2.0, 1.0]]
    assert table.accuracies[0, :, 0].tolist() == [1.0, 0.0]
    # Lengths ascend here, so they are position too.
    assert dict(zip(BASELINES, table.mean().tolist(), strict=True)) == dict.fromkeys(BASELINES, 0.5)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), labels=st.text("er-", min_size=2, max_size=12).filter(lambda x: "e" in x and "r" in x))
def test_accuracy_of_pairs(data, labels):
    values = st.lists(st.integers(0, 5), min_size=len(labels), max_size=len(labels))
    scores = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=4))).float()
    response = steps_of(labels, scores)
    differences = scores[:, response.essential][:, :, None] - scores[:, response.redundant][:, None, :]
    expected = ((differences > 0).double() + 0.5 * (differences == 0).double()).mean((1, 2))
    torch.testing.assert_close(pair_accuracy(scores, step_pairs(response, "all")[0]), expected)


def noise_responses(number: int, num_steps: int = 24) -> list[ScoredSteps]:
    """Responses whose likelihood drops are noise, labelled by the rules of the discovery, the derivation anywhere.

    Scores: noise, and heads that look back to the beginning and to the end, with noise of the size of some steps.
    """
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(num_steps) / num_steps
    responses = []
    for index in range(number):
        derivation = int(torch.randint(6, num_steps, (1,), generator=generator))
        drops = torch.randn(derivation + 1, generator=generator).tolist() + [0.0] * (num_steps - derivation - 1)
        by_position = label_after_answer(["forward"] * num_steps, derivation)
        by_likelihood = label_by_likelihood(drops[: derivation + 1], LikelihoodThresholds(0.25, 0.5, 0.0))
        by_likelihood += [None] * (num_steps - derivation - 1)
        labels = [REDUNDANT if a == REDUNDANT else b for a, b in zip(by_position, by_likelihood, strict=True)]
        text = "".join({ESSENTIAL: "e", REDUNDANT: "r", None: "-"}[label] for label in labels)
        noise = torch.rand(3, num_steps, generator=generator)
        scores = torch.stack([noise[0], noise[1] - position, noise[2] + position])
        one = steps_of(text, scores, derivation, problem=str(index))
        one.lengths = torch.randint(5, 80, (num_steps,), generator=generator)
        responses.append(one)
    return responses


def test_labels_of_noise_reward_position_on_all_pairs_and_nothing_on_matched_ones():
    responses = noise_responses(400)
    generator = torch.Generator().manual_seed(1)
    reports = {
        name: criterion_report(responses, name, RankingOptions(), generator) for name in ("all", "before", "matched")
    }
    # The confound: position alone, and a head that looks back to the beginning, seem to know needed steps.
    noise, back, ahead = reports["all"].sra
    assert reports["all"].baselines["-index"][0] > 0.75 and back > 0.65 and ahead < 0.35
    # The criterion that ranks: position alone has one half to the last digit, a head of position and noise nearly.
    matched = reports["matched"]
    assert matched.baselines["-index"][0] == matched.baselines["index"][0] == pytest.approx(0.5, abs=1e-12)
    assert min(matched.num_pairs) > 500
    for value in (*matched.sra, matched.baselines["length"][0]):
        assert value == pytest.approx(0.5, abs=0.03)
    for value in (noise, *reports["before"].sra, reports["before"].baselines["-index"][0]):
        assert value == pytest.approx(0.5, abs=0.04)
    assert choose_criterion(reports, RankingOptions()) == ("matched", "")


def test_a_head_that_knows_still_wins_on_matched_pairs():
    responses = noise_responses(100)
    generator = torch.Generator().manual_seed(2)
    for one in responses:
        knowing = 0.5 * one.essential + torch.rand(one.essential.shape, generator=generator)
        one.scores = torch.cat([one.scores, knowing[None]])
    report = criterion_report(responses, "matched", RankingOptions(), generator)
    # P(U + 1/2 > V) for uniform U, V is 1 - (1/2)² / 2.
    assert report.sra[3] == pytest.approx(0.875, abs=0.02)
    assert report.lower[3] < 0.875 < report.upper[3] and report.upper[3] - report.lower[3] < 0.08


def test_malformed_scores_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        ScoredSteps(torch.ones(1, 1), torch.tensor([True]), torch.tensor([True]), torch.ones(1), "p")
    with pytest.raises(ValueError, match="must be"):
        ScoredSteps(torch.ones(1, 2), torch.tensor([True]), torch.tensor([False]), torch.ones(2), "p")
