"""Rank correlation at equal places, in closed form."""

import pytest
import torch

from attn_trainers.tiny.matched_ranks import centred_ranks, matched_correlation


def test_ranks_are_centred_within_strata_with_ties_in_the_middle():
    values = torch.tensor([3.0, 1.0, 1.0, 9.0, 5.0])
    # Stratum 0 holds 3, 1, 1: ranks 1, -1/2, -1/2 of 3 about their middle. Stratum 1 holds 9, 5.
    expected = torch.tensor([2 / 6, -1 / 6, -1 / 6, 1 / 4, -1 / 4], dtype=torch.float64)
    torch.testing.assert_close(centred_ranks(values, torch.tensor([0, 0, 0, 1, 1])), expected)


def test_position_alone_correlates_with_nothing_and_the_truth_itself_wholly():
    generator = torch.Generator().manual_seed(0)
    truths = [torch.arange(6, 0, -1) + 3.0 * torch.randint(2, (6,), generator=generator) for _ in range(20)]
    place = torch.arange(6, 0, -1.0)
    found = matched_correlation([torch.stack([t, -t, place]) for t in truths], truths)
    assert found.values[:2].tolist() == pytest.approx([1.0, -1.0])
    assert found.lower[:2].tolist() == pytest.approx([1.0, -1.0])
    assert found.values[2].isnan()  # it never differs within a place


def test_solutions_of_unequal_length_are_compared_from_their_end():
    # The last steps are compared with each other, so are those before; the first of the long one with none.
    signals = [torch.tensor([[7.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0]])]
    truths = [torch.tensor([0.0, 5.0, 1.0]), torch.tensor([6.0, 0.0])]
    found = matched_correlation(signals, truths, samples=10)
    assert found.values.tolist() == pytest.approx([1.0])  # 1 < 2 with 5 < 6, and 2 > 1 with 1 > 0
