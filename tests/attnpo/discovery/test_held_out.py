"""The chosen heads on problems that had no part in choosing them."""

import pytest
import torch

from attn_trainers.attnpo.discovery.held_out import is_held_out, measure_held_out
from attn_trainers.attnpo.discovery.pairs import ScoredSteps
from attn_trainers.attnpo.discovery.ranking import RankingOptions


def test_held_out_responses_measure_the_chosen_heads():
    essential, redundant = torch.tensor([True, False]), torch.tensor([False, True])
    # Head 0 ranks 3 of 4 responses right, head 1 none, head 2 all; heads 0 and 1 together as head 0.
    scores = [torch.tensor([[right, 1.0 - right], [0.1, 0.3], [1.0, 0.0]]) for right in (1.0, 1.0, 1.0, 0.0)]
    lengths = torch.tensor([2, 1])
    responses = [ScoredSteps(one, essential, redundant, lengths, str(i)) for i, one in enumerate(scores)]
    # No pair has the redundant step first, so that all pairs are compared.
    report = measure_held_out(responses, [0, 1], "matched", RankingOptions(), torch.Generator().manual_seed(0))
    assert (report.criterion, report.num_responses, report.num_pairs) == ("all", 4, [4])
    assert (report.chosen, report.best_single, report.median) == (0.75, 0.75, 0.75)
    assert report.lower < 0.75 < report.upper == 1.0
    assert report.share_below == pytest.approx(1 / 3)
    assert [report.baselines[name][0] for name in ("-index", "index", "length")] == [1.0, 0.0, 1.0]
    one_kind = [ScoredSteps(scores[0], essential, torch.zeros(2, dtype=torch.bool), lengths, "p")]
    assert measure_held_out(one_kind, [0], "all", RankingOptions(), torch.Generator()) is None

    turned = [ScoredSteps(scores[0], redundant, essential, lengths, "p")]
    both = measure_held_out(responses + turned, [0], "matched", RankingOptions(), torch.Generator().manual_seed(0))
    assert (both.criterion, both.num_pairs, both.chosen) == ("matched", [4, 1], (0.75 + 0.0) / 2)


def test_the_held_out_share_belongs_to_problems():
    assert not any(is_held_out(str(i), 0.0, 0) for i in range(100))
    assert sum(is_held_out(str(i), 0.3, 0) for i in range(2000)) == pytest.approx(600, abs=70)
