"""Peaks and coupling statistics on closed forms and on the reference signals."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attention.heads import jaccard
from attn_trainers.attention.rhythm import peaks
from attn_trainers.inspection.analysis import (
    column_kurtosis,
    entropy_at_waad_peaks,
    fai_peaks_after_waad_peaks,
    peak_average,
    receiver_heads,
    receiver_peaks_at_global_peaks,
)


NAN = math.nan


def indices(mask):
    return mask.nonzero().squeeze(1).tolist()


@pytest.fixture(scope="module")
def reference_signals(shared_dir):
    cases = json.loads((shared_dir / "golden" / "attention_signals.json").read_text())["cases"]
    assert len(cases) == 4
    return [(case["waad"], [NAN if value is None else value for value in case["fai"]]) for case in cases]


def peaks_by_definition(values, fraction):
    """The three conditions one token at a time."""
    defined = sorted(x for x in values if not math.isnan(x))
    if not defined:
        return []
    rank = (1 - fraction) * (len(defined) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(defined) - 1)
    threshold = defined[low] + (rank - low) * (defined[high] - defined[low])
    x = [-math.inf, *(-math.inf if math.isnan(v) else v for v in values), -math.inf]
    return [t - 1 for t in range(1, len(x) - 1) if x[t] > x[t - 1] and x[t] >= x[t + 1] and x[t] >= threshold]


def test_peaks_of_the_key_case():
    waad = [6, 3, 2, 1.5, 1, 7, 3, 2, 1, 1.2, 1, 5, 4, 2, 1.5, 1.1, 6.5, 2.5, 1.4, 1.3]
    assert indices(peaks(torch.tensor(waad))) == [0, 5, 11, 16]


def test_plateau_ends_and_undefined_values():
    assert indices(peaks(torch.tensor([1.0, 5.0, 5.0, 1.0]), 1.0)) == [1]  # first of a plateau
    assert indices(peaks(torch.tensor([5.0, 1.0, 1.0, 5.0]), 1.0)) == [0, 3]
    assert indices(peaks(torch.tensor([NAN, 2.0, NAN, 1.0]), 1.0)) == [1, 3]
    assert indices(peaks(torch.full((4,), NAN))) == []
    assert indices(peaks(torch.zeros(0))) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0, NAN]), max_size=30), st.sampled_from([0.25, 0.5, 1.0]))
def test_peaks_by_definition(values, fraction):
    assert indices(peaks(torch.tensor(values, dtype=torch.float64), fraction)) == peaks_by_definition(values, fraction)


def test_peak_density_on_independent_noise():
    noise = torch.rand(400, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = torch.stack([peaks(row) for row in noise]).double().mean().item()
    # Each peak is a top-30 % token that also beats both neighbours: integral of x^2 from 0.7 to 1.
    assert density == pytest.approx((1 - 0.7**3) / 3, abs=0.002)


def test_entropy_at_peaks():
    waad = torch.tensor([0.0, 9.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0])
    entropies = torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0, 0.0, 2.0, 2.0])
    coupling = entropy_at_waad_peaks(entropies, waad)
    assert (coupling.observed, coupling.random, coupling.lift) == (2.0, 1.0, 1.0)
    assert coupling.densities == {"waad": 0.25}


def test_receiver_peaks():
    # Global peaks at 1 and 5, receiver peaks at 1 and 3; the last two tokens are undefined.
    global_fai = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0, NAN, NAN])
    receiver = torch.tensor([0.0, 0.9, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0, NAN, NAN])
    coupling = receiver_peaks_at_global_peaks(receiver, global_fai)
    assert (coupling.observed, coupling.random, coupling.lift) == (0.5, 0.25, 1.0)
    assert coupling.densities == {"receiver_fai": 0.25, "global_fai": 0.25}


def test_fai_peaks_at_or_after_waad_peaks():
    # WAAD peaks at 0 and 5: tokens 0, 1, 5, 6 are near, two of the last of which have no FAI.
    waad = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0, 0.0])
    fai = torch.tensor([0.0, 0.9, 0.0, 0.7, 0.0, NAN, NAN, NAN])
    coupling = fai_peaks_after_waad_peaks(fai, waad)
    assert (coupling.observed, coupling.random) == (0.5, 0.4)
    assert coupling.lift == pytest.approx(0.25, abs=1e-12)
    assert coupling.densities == {"fai": 0.4, "waad": 0.25}


def test_chance_level_is_the_mean_over_shuffles(reference_signals):
    waad, fai = (torch.tensor(values, dtype=torch.float64) for values in reference_signals[0])
    coupling = fai_peaks_after_waad_peaks(fai, waad)
    planning = indices(peaks(waad))
    near = {t for peak in planning for t in (peak, peak + 1)}
    defined = [t for t in range(len(fai)) if not math.isnan(fai[t])]
    count = len(indices(peaks(fai)))
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(3000):
        shuffled = [defined[i] for i in torch.randperm(len(defined), generator=generator)[:count].tolist()]
        shares.append(sum(t in near for t in shuffled) / count)
    shares = torch.tensor(shares, dtype=torch.float64)
    assert abs(shares.mean().item() - coupling.random) < 5 * shares.std().item() / math.sqrt(len(shares))


def test_couplings_of_the_reference_signals(reference_signals):
    for waad_values, fai_values in reference_signals:
        waad = torch.tensor(waad_values, dtype=torch.float64)
        fai = torch.tensor(fai_values, dtype=torch.float64)
        planning, anchors = peaks_by_definition(waad_values, 0.3), peaks_by_definition(fai_values, 0.3)
        assert (indices(peaks(waad)), indices(peaks(fai))) == (planning, anchors)
        near = {t for peak in planning for t in (peak, peak + 1) if t < len(fai_values)}
        defined = [t for t, value in enumerate(fai_values) if not math.isnan(value)]
        coupling = fai_peaks_after_waad_peaks(fai, waad)
        assert coupling.observed == pytest.approx(sum(t in near for t in anchors) / len(anchors), abs=1e-12)
        assert coupling.random == pytest.approx(sum(t in near for t in defined) / len(defined), abs=1e-12)
        assert receiver_peaks_at_global_peaks(fai, fai).observed == 1.0


def test_no_peak_gives_nan():
    coupling = entropy_at_waad_peaks(torch.ones(4), torch.full((4,), NAN))
    assert math.isnan(coupling.observed)
    assert (coupling.random, coupling.densities) == (1.0, {"waad": 0.0})


def test_kurtosis():
    # One hot column of n: m4 / m2^2 = (n^2 - 3n + 3) / (n - 1), here n = 8; two values in equal parts: 1.
    one_hot = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    two_values = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    kurtosis = column_kurtosis(torch.stack([one_hot, two_values, torch.cat([one_hot[:-1], torch.tensor([NAN])])]))
    expected = [43 / 7 - 3, 1 - 3, 31 / 6 - 3]
    assert kurtosis.tolist() == pytest.approx(expected, abs=1e-12)


def test_receiver_heads_are_the_most_peaked():
    one_hot = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    two_values = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    constant = torch.ones(8)
    columns = torch.stack([constant, two_values, one_hot, one_hot * 3, two_values, constant, two_values])
    assert receiver_heads([columns, columns]) == [2, 3]  # floor(0.3 * 7), the scale does not count
    assert receiver_heads([columns], fraction=0.45) == [2, 3, 1]
    assert receiver_heads([columns[:2]]) == [1]
    with pytest.raises(ValueError, match=r"column_means=\[\] has no response; give"):
        receiver_heads([])


def test_peak_average_never_falls():
    assert peak_average([1.0, 3.0, 0.0, 5.0], 0.5) == [1.0, 2.0, 2.0, 3.5]


def test_jaccard():
    assert jaccard(["a", "b", "b"], ["b", "c"]) == 1 / 3
    assert jaccard([(0, 1)], [(0, 1)]) == 1.0
    assert jaccard([], []) == 1.0
    assert jaccard([], ["a"]) == 0.0
