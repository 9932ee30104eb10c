"""Content words, positions and statistics of the perturbation check, on closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.inspection.perturbation import (
    Perturbation,
    PerturbedResponse,
    choose_positions,
    content_words,
    summarise_perturbations,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat sat on the mat, and THE Mat was the cat's.", {"cat", "sat", "mat"}),
        ("She doesn't sell 1,000 eggs; they’re 2.5 dollars.", {"sell", "1,000", "eggs", "2.5", "dollars"}),
        (r"So \boxed{18} is it.Next: x_1 = 3.", {"boxed", "18", "next", "x", "1", "3"}),
        ("Größe über alles", {"größe", "über", "alles"}),
        ("it is, not! -- (of) ...", set()),
        ("", set()),
    ],
)
def test_content_words(text, words):
    assert content_words(text) == words


def test_positions_of_highest_and_lowest_fai():
    fai = torch.tensor([0.1, 0.9, math.nan, 0.5, 0.9, 0.2, 0.0, 0.7])
    every = torch.ones(8, dtype=torch.bool)
    assert choose_positions(fai, every, 3) == ([1, 4, 7], [6, 0, 5])
    assert choose_positions(fai, every, 9) == ([1, 4, 7], [6, 0, 5])  # 7 are defined: 3 and 3
    assert choose_positions(fai, torch.arange(8) < 5, 3) == ([1, 4], [0, 3])
    assert choose_positions(fai, torch.arange(8) < 1, 3) == ([], [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=20), st.integers(1, 6))
def test_positions_never_overlap_and_are_ordered(values, count):
    top, bottom = choose_positions(torch.tensor(values), torch.ones(len(values), dtype=torch.bool), count)
    defined = [v for v in values if not math.isnan(v)]
    assert len(top) == len(bottom) == min(count, len(defined) // 2)
    assert not set(top) & set(bottom)
    assert [values[p] for p in top] == sorted(defined, reverse=True)[: len(top)]
    assert [values[p] for p in bottom] == sorted(defined)[: len(bottom)]


def perturbed(top: list[list[float]], bottom: list[list[float]], num_tokens: int = 10) -> PerturbedResponse:
    """Top positions from 0 on and bottom positions from 5 on, with these Jaccards."""
    return PerturbedResponse(
        num_tokens,
        [
            Perturbation(start + i, is_top, 0.5, "token", ["other"] * len(jaccards), jaccards)
            for is_top, start, positions in ((True, 0, top), (False, 5, bottom))
            for i, jaccards in enumerate(positions)
        ],
    )


def test_means_of_one_response():
    response = perturbed([[0.0, 0.5, 1.0], [0.0, 0.0, 0.3]], [[1.0], [0.5]])
    assert response.mean_jaccard(True) == pytest.approx(0.3)  # (0.5 + 0.1) / 2
    assert response.mean_jaccard(False) == 0.75
    assert (response.mean_place(True), response.mean_place(False)) == (0.05, 0.55)
    assert math.isnan(PerturbedResponse(3, []).mean_jaccard(True))


def test_summary_over_responses():
    # Differences bottom - top: 0.5, 0.25, -0.25, 0; the equal pair is not below.
    pairs = [(0.25, 0.75), (0.5, 0.75), (0.5, 0.25), (1.0, 1.0)]
    summary = summarise_perturbations([*(perturbed([[a]], [[b]]) for a, b in pairs), PerturbedResponse(2, [])])
    assert (summary.responses, summary.left_out, summary.continuations) == (4, 1, 8)
    assert (summary.comparison.first, summary.comparison.second) == (0.5625, 0.6875)
    assert summary.comparison.difference == 0.125
    assert (summary.below, summary.share_below) == (2, 0.5)
    assert summary.places == (0.0, 0.5)
    low, high = summary.comparison.interval
    assert -0.25 <= low < 0.125 < high <= 0.5


def test_interval_of_one_difference_is_that_difference():
    summary = summarise_perturbations([perturbed([[0.25]], [[0.75]])] * 3)
    assert summary.comparison.interval == (0.5, 0.5)
    assert summary.share_below == 1.0


def test_nothing_to_compare():
    summary = summarise_perturbations([PerturbedResponse(1, [])])
    assert (summary.responses, summary.left_out, summary.comparison, summary.places) == (0, 1, None, None)
    assert math.isnan(summary.share_below)
