"""Credit factors against closed forms, the reference file and structural properties."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.rhythm.credit import (
    BOTTOM_SCHEMES,
    SCHEMES,
    CreditOptions,
    apply_sign,
    credit_factors,
    credit_sets,
    response_credit,
    top_tokens,
    waad_delta,
)
from attn_trainers.rhythm.metrics import credit_totals
from attn_trainers.rhythm.options import RhythmOptions


NAN = math.nan
DTYPES = [torch.float32, torch.float64]

# Few distinct values, so that ties abound; NaN in FAI as at a response's end.
signal_values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 7.5])
signals = st.lists(st.tuples(signal_values, st.one_of(signal_values, st.just(NAN))), min_size=2, max_size=40)


def as_tensors(pairs):
    waad, fai = zip(*pairs, strict=True)
    return torch.tensor(waad, dtype=torch.float64), torch.tensor(fai, dtype=torch.float64)


def indices(mask):
    return mask.nonzero().squeeze(1).tolist()


def factors_from(n, values):
    factors = torch.ones(n, dtype=torch.float64)
    for index, value in values.items():
        factors[index] = value
    return factors.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_key_case(key_case, dtype):
    waad, fai = key_case(dtype)
    sets = credit_sets(waad, fai)
    assert indices(sets.preplan) == [0, 4, 5, 10, 12, 15, 16, 17]
    assert indices(sets.anchors) == [0, 1, 5, 6, 11, 12, 13, 17]
    assert indices(sets.dominated) == [13]
    assert indices(sets.intro) == [10]
    coupled = factors_from(20, dict.fromkeys([0, 1, 5, 6, 11, 12, 17], 1.5) | {13: 1.25, 10: 1.25})
    assert credit_factors(waad, fai, "coupled").tolist() == coupled
    assert credit_factors(waad, fai, "coupled").dtype == dtype
    assert credit_factors(waad, fai, "local").tolist() == factors_from(20, dict.fromkeys(indices(sets.preplan), 1.5))
    assert credit_factors(waad, fai, "global").tolist() == factors_from(20, dict.fromkeys(indices(sets.anchors), 1.5))


def test_key_case_thresholds(key_case):
    waad, _ = key_case()
    assert torch.quantile(waad, 0.5).item() == 2.0
    assert torch.quantile(waad_delta(waad), CreditOptions().tau_delta_level).item() == pytest.approx(1.04, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_factors(shared_dir, dtype):
    cases = json.loads((shared_dir / "golden" / "attention_signals.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases:
        waad = torch.tensor(case["waad"], dtype=dtype)
        fai = torch.tensor([NAN if value is None else value for value in case["fai"]], dtype=dtype)
        for scheme in ("local", "global", "coupled"):
            assert credit_factors(waad, fai, scheme).tolist() == case[f"gamma_{scheme}"]


@settings(max_examples=200, deadline=None)
@given(signals, st.sampled_from([0.0, 0.1, 0.3, 0.4, 0.5, 0.75, 1.0]), st.booleans())
def test_top_tokens_is_exact_and_stable(pairs, fraction, largest):
    _, values = as_tensors(pairs)
    chosen = indices(top_tokens(values, fraction, largest=largest))
    defined = [i for i in range(len(values)) if not math.isnan(values[i])]
    ranked = sorted(defined, key=lambda i: (-values[i] if largest else values[i], i))  # Python's own sort as reference
    assert chosen == sorted(ranked[: math.floor(fraction * len(values) + 0.5)])


def test_all_tied_values_select_the_first_k():
    tied = torch.full((25,), 3.0)
    assert indices(top_tokens(tied, 0.1)) == [0, 1, 2]  # floor(2.5 + 0.5)
    assert indices(top_tokens(tied, 0.1, largest=False)) == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(signals, st.sampled_from(SCHEMES + BOTTOM_SCHEMES), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_factors_lie_between_one_and_both_bonuses(pairs, scheme, alpha):
    waad, fai = as_tensors(pairs)
    generator = torch.Generator().manual_seed(0)
    factors = credit_factors(waad, fai, scheme, alpha=alpha, entropies=waad, generator=generator)
    assert factors.shape == waad.shape
    assert factors.min() >= 1.0
    assert factors.max() <= 1.5 + 0.5 * alpha * scheme.startswith("coupled")


@settings(max_examples=200, deadline=None)
@given(signals, st.sampled_from(["additive", "max"]))
def test_alpha_zero_makes_coupled_global(pairs, overlap):
    waad, fai = as_tensors(pairs)
    coupled = credit_factors(waad, fai, "coupled", alpha=0.0, overlap=overlap)
    assert coupled.tolist() == credit_factors(waad, fai, "global").tolist()


@settings(max_examples=200, deadline=None)
@given(signals, st.sampled_from(["abs", "drop"]), st.sampled_from(["argmax_delta", "argmax_waad"]), st.integers(1, 4))
def test_dominated_and_intro_tokens_by_their_definition(pairs, delta_mode, intro_mode, lookback):
    waad, fai = as_tensors(pairs)
    options = CreditOptions(delta_mode=delta_mode, intro_mode=intro_mode, lookback=lookback)
    sets = credit_sets(waad, fai, options)
    n, w = len(waad), waad.tolist()
    drops = [w[t] - w[t + 1] for t in range(n - 1)] + [0.0]
    delta = [abs(x) if delta_mode == "abs" else max(x, 0.0) for x in drops]
    tau_waad = torch.quantile(waad, 0.5).item()
    tau_delta = torch.quantile(torch.tensor(delta, dtype=torch.float64), 0.6).item()
    ranked = delta if intro_mode == "argmax_delta" else w
    dominated, intro = set(), set()
    for t in indices(sets.anchors):
        window = range(max(0, t - lookback), t)
        if window and w[t] <= tau_waad and max(delta[u] for u in window) >= tau_delta:
            dominated.add(t)
            intro.add(max(window, key=lambda u: (ranked[u], u)))
    assert set(indices(sets.dominated)) == dominated
    assert set(indices(sets.intro)) == intro


def overlap_case():
    """Token 1 is a plain anchor and, with the steepest fall, introduces token 2, a dominated anchor."""
    waad = torch.tensor([5.0, 9.0, 1.0, 1.0, 1.5])
    fai = torch.tensor([0.0, 0.9, 0.8, 0.1, 0.1])
    return waad, fai


@pytest.mark.parametrize(
    ("overlap", "token_1"),
    [("additive", 1.75), ("max", 1.5), ("overwrite", 1.25)],
)
def test_overlap_of_anchor_and_introductory_token(overlap, token_1):
    factors = credit_factors(*overlap_case(), "coupled", overlap=overlap)
    assert factors.tolist() == [1.0, token_1, 1.25, 1.0, 1.0]


def test_two_anchors_that_share_an_introductory_token_pay_it_once():
    waad = torch.tensor([9.0, 1.0, 1.0, 2.0, 2.0])
    fai = torch.tensor([0.1, 0.9, 0.8, 0.1, 0.1])
    sets = credit_sets(waad, fai)
    assert (indices(sets.dominated), indices(sets.intro)) == ([1, 2], [0])
    assert credit_factors(waad, fai, "coupled").tolist() == [1.25, 1.25, 1.25, 1.0, 1.0]


def test_intro_mode_and_delta_mode_change_the_choice():
    # Delta: 1, 6, 5, 0.5, 0; the rise 2 -> 8 (token 1) counts only with "abs".
    waad = torch.tensor([3.0, 2.0, 8.0, 3.0, 2.5])
    assert waad_delta(waad).tolist() == [1.0, 6.0, 5.0, 0.5, 0.0]
    assert waad_delta(waad, "drop").tolist() == [1.0, 0.0, 5.0, 0.5, 0.0]
    fai = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.8])
    assert indices(credit_sets(waad, fai).intro) == [1]
    assert indices(credit_sets(waad, fai, CreditOptions(intro_mode="argmax_waad")).intro) == [2]
    assert indices(credit_sets(waad, fai, CreditOptions(delta_mode="drop")).intro) == [2]


def test_thresholds_are_quantile_levels(key_case):
    waad, fai = key_case()
    assert indices(credit_sets(waad, fai, CreditOptions(tau_delta=0.5)).dominated) == [13]
    # Everything passes the WAAD test; the Delta test still needs a recent change of at least 1.04.
    assert indices(credit_sets(waad, fai, CreditOptions(tau_waad=1.0)).dominated) == [1, 5, 6, 11, 12, 13, 17]
    assert indices(credit_sets(waad, fai, CreditOptions(tau_delta=1.0)).dominated) == []


def test_bottom_schemes_select_the_lowest():
    waad = torch.tensor([1.0, 5.0, 5.0, 2.0, 2.5])  # Delta 4, 0, 3, 0.5, 0
    fai = torch.tensor([0.5, 0.1, NAN, 0.3, 0.2])
    assert indices(credit_factors(waad, fai, "local_bottom") > 1) == [1, 4]
    assert indices(credit_factors(waad, fai, "global_bottom") > 1) == [1, 4]
    entropies = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.5])
    assert indices(credit_factors(waad, fai, "entropy_bottom", entropies=entropies) > 1) == [2, 3]
    assert indices(credit_factors(waad, fai, "entropy", entropies=entropies) > 1) == [0, 4]
    assert indices(credit_sets(waad, fai, largest=False).anchors) == [1, 4]
    assert credit_factors(waad, fai, "coupled_bottom", alpha=0.0).tolist() == [1.0, 1.5, 1.0, 1.0, 1.5]


def test_random_scheme_is_uniform_and_leaves_the_global_generator_alone(key_case):
    waad, fai = key_case()
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([credit_factors(waad, fai, "random", generator=generator) for _ in range(2000)])
    assert torch.equal(torch.get_rng_state(), state)
    assert (draws > 1).sum(1).tolist() == [8] * 2000
    # Each token is drawn with probability 0.4: five standard errors of a share over 2000 draws.
    assert ((draws > 1).double().mean(0) - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 2000)
    generator.manual_seed(3)
    assert torch.equal(credit_factors(waad, fai, "random", generator=generator), draws[0])


def test_whole_response_selected_amplifies_all_defined_tokens(key_case):
    waad, fai = key_case()
    assert credit_factors(waad, fai, "global", top_fraction=1.0).tolist() == [1.5] * 18 + [1.0, 1.0]


def test_renorm_divides_by_the_mean(key_case):
    waad, fai = key_case()
    plain, renormed = credit_factors(waad, fai, "global"), credit_factors(waad, fai, "global", renorm="mean1")
    assert renormed.mean().item() == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(renormed * 1.2, plain, rtol=0, atol=1e-12)  # 8 of 20 tokens at 1.5


@pytest.mark.parametrize("scheme", SCHEMES + BOTTOM_SCHEMES)
@pytest.mark.parametrize("n", [0, 1])
def test_short_responses_keep_factor_one(scheme, n):
    assert credit_factors(torch.full((n,), 2.0), torch.full((n,), 0.5), scheme).tolist() == [1.0] * n


def test_no_anchor_is_defined():
    waad = torch.tensor([3.0, 1.0, 4.0, 1.0])
    assert credit_factors(waad, torch.full((4,), NAN), "coupled").tolist() == [1.0] * 4


def test_factors_carry_no_gradient(key_case):
    waad, fai = key_case()
    assert not credit_factors(waad.requires_grad_(), fai.requires_grad_(), "coupled").requires_grad


def test_sign():
    factors = torch.tensor([[1.5, 1.0, 1.25]]).expand(3, 3)
    advantage = torch.tensor([[2.0], [-1.0], [0.0]])
    one = [1.0, 1.0, 1.0]
    row = [1.5, 1.0, 1.25]
    assert apply_sign(factors, advantage, "both").tolist() == [row, row, row]
    assert apply_sign(factors, advantage, "pos").tolist() == [row, one, one]
    assert apply_sign(factors, advantage, "neg").tolist() == [one, row, one]
    assert apply_sign(factors[0], -0.5, RhythmOptions(preset="paper_v1").gamma_sign).tolist() == one
    assert apply_sign(factors[0], -0.5, RhythmOptions(preset="paper_v2").gamma_sign).tolist() == row


def test_metrics_of_the_key_case(key_case):
    waad, fai = key_case()
    totals = credit_totals([response_credit(waad, fai, "coupled")], [(waad, fai)])
    metrics = {name: total / count for name, (total, count) in totals.items() if name.endswith(("share", "factor"))}
    expected = {"amplified_share": 9 / 20, "mean_factor": 24.0 / 20, "dominated_share": 1 / 20, "intro_share": 1 / 20}
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_metrics_on_independent_noise():
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(300):
        waad, fai = torch.rand(2, 200, generator=generator, dtype=torch.float64)
        fai[-10:] = NAN
        draws.append((response_credit(waad, fai, "coupled"), (waad, fai)))
    totals = credit_totals(*map(list, zip(*draws, strict=True)))
    mean_factor, dominated, intro = (
        totals[name][0] / totals[name][1] for name in ("mean_factor", "dominated_share", "intro_share")
    )
    assert mean_factor == pytest.approx(1.194, abs=0.002)
    assert dominated == pytest.approx(0.15, abs=0.005)
    assert intro == pytest.approx(0.13, abs=0.005)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amplification", 0.5),
        ("amplification", NAN),
        ("top_fraction", 1.2),
        ("alpha", -0.1),
        ("lookback", 0),
        ("tau_waad", 2.0),
        ("tau_delta", -1.0),
        ("delta_mode", "square"),
        ("intro_mode", "first"),
        ("overlap", "sum"),
        ("renorm", "mean"),
        ("gamma_sign", "none"),
    ],
)
def test_bad_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        CreditOptions(**{field: value})


def test_bad_calls_are_named(key_case):
    waad, fai = key_case()
    with pytest.raises(ValueError, match="scheme='random_bottom'"):
        credit_factors(waad, fai, "random_bottom")
    with pytest.raises(ValueError, match="option='gamma'"):
        credit_factors(waad, fai, "local", gamma=2.0)
    with pytest.raises(ValueError, match="preset='v2'"):
        RhythmOptions(preset="v2")
    with pytest.raises(ValueError, match="generator=None"):
        credit_factors(waad, fai, "random")
    with pytest.raises(ValueError, match="entropies=None"):
        credit_factors(waad, fai, "entropy")
    with pytest.raises(ValueError, match=r"waad has shape \(20,\) and fai \(19,\)"):
        credit_factors(waad, fai[1:], "local")


@pytest.mark.parametrize("scheme", ["local", "global", "random", "entropy", "global_bottom"])
def test_only_eligible_tokens_are_selected(scheme):
    generator = torch.Generator().manual_seed(0)
    waad, fai, entropies = torch.rand(3, 50, generator=generator)
    eligible = torch.arange(50) % 3 != 0
    factors = credit_factors(waad, fai, scheme, entropies=entropies, generator=generator, eligible=eligible)
    assert (factors[~eligible] == 1).all()
    assert (factors > 1).sum() == 20  # 40 % of all tokens, taken from 33


def test_ineligible_tokens_may_introduce_an_anchor():
    waad = torch.tensor([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    fai = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    eligible = torch.ones(10, dtype=torch.bool)
    eligible[1] = False
    sets = credit_sets(waad, fai, CreditOptions(top_fraction=0.2), eligible=eligible)
    assert sets.anchors.nonzero().flatten().tolist() == [2, 3]
    assert sets.dominated.nonzero().flatten().tolist() == [2, 3]
    assert sets.intro.nonzero().flatten().tolist() == [1]
