"""Sums and counts behind the logged means."""

import pytest
import torch

from attn_trainers.attention.heads import HeadSets
from attn_trainers.rhythm.credit import Credit, credit_sets, response_credit
from attn_trainers.rhythm.metrics import credit_totals, head_overlap, mean_of_defined, measure_totals


def test_totals_without_signals():
    factors = [torch.tensor([1.0, 1.5, 1.75]), torch.tensor([1.0]), torch.zeros(0)]
    sets = [credit_sets(torch.zeros_like(row), torch.zeros_like(row)) for row in factors]
    totals = credit_totals([Credit(*parts) for parts in zip(factors, sets, strict=True)], None)
    assert totals == {"amplified_share": (2, 4), "mean_factor": (5.25, 4)}


def test_undefined_values_count_nothing():
    assert mean_of_defined([torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan]), torch.tensor([3.0])]) == (
        4.0,
        2,
    )
    assert mean_of_defined([]) == (0, 0)


def test_totals_weigh_tokens():
    generator = torch.Generator().manual_seed(0)
    signals = [(torch.rand(n, generator=generator), torch.rand(n, generator=generator)) for n in (40, 7, 0)]
    totals = credit_totals([response_credit(*signal, "coupled") for signal in signals], signals)
    sets = [credit_sets(*signal) for signal in signals[:2]]
    assert totals["dominated_share"] == pytest.approx((sum(int(s.dominated.sum()) for s in sets), 47))
    assert totals["intro_share"] == pytest.approx((sum(int(s.intro.sum()) for s in sets), 47))
    assert totals["dominated_share"][0] > 0
    assert totals["waad_mean"] == pytest.approx((sum(w.double().sum().item() for w, _ in signals), 47))


def test_head_overlap():
    first = HeadSets([(1, 0), (1, 1)], [(2, 0), (2, 1)])
    assert head_overlap(first, None) == {}
    second = HeadSets([(1, 0), (1, 2)], [(2, 0), (2, 1)])
    assert head_overlap(first, second) == {"head_jaccard/local": 1 / 3, "head_jaccard/global": 1.0}


def test_measure_totals_leave_empty_responses_out():
    measures = [(torch.tensor([0.25, torch.nan]), torch.zeros(2)), None]
    totals = measure_totals(measures, [torch.tensor([0.5, 0.25]), torch.zeros(0)])
    assert totals == {"reward/breadth_mean": (0.25, 1), "reward/fai_mean": (0.75, 2)}
