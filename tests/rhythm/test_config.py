"""Defaults, presets and refusals of RhythmConfig."""

import pytest

from attn_trainers import RhythmConfig
from attn_trainers.rhythm.options import CreditOptions


def config(**options) -> RhythmConfig:
    return RhythmConfig(**({"output_dir": "unused", "use_cpu": True, "bf16": False} | options))


def test_defaults_are_the_papers_second_version():
    args = config()
    assert (args.scheme, args.rhythm_lambda, args.gamma_sign, args.horizon) == ("coupled", 0.0, "both", (10, 100))
    assert (args.head_scope, args.reward_head_scope, args.calibration_responses) == ("batch", "calibration", 64)
    assert (args.head_pool, args.head_fraction, args.waad_window, args.row_offset) == ("middle", 0.3, 10, 0)
    assert (args.fai_tail, args.skip_punctuation, args.sink_tokens) == ("undefined", False, 1)
    assert CreditOptions.of(args) == CreditOptions(
        amplification=1.5, top_fraction=0.4, delta_mode="abs", intro_mode="argmax_delta", alpha=0.5, lookback=3,
        tau_waad=0.5, tau_delta=None, overlap="additive", renorm="none", gamma_sign="both",
    )  # fmt: skip
    assert (args.reward_rank, args.reward_norm, args.reward_segment) == (True, "token_mean", "waad")
    assert (args.reward_mode, args.reward_gate) == ("split", "always")


def test_presets():
    first = config(preset="paper_v1")
    assert (first.scheme, first.rhythm_lambda, first.gamma_sign, first.horizon) == ("coupled", 0.0, "pos", (10, 50))
    reward = config(preset="rhythm_reward")
    assert (reward.scheme, reward.rhythm_lambda, reward.gamma_sign) == ("none", 0.1, "both")


def test_given_values_win_over_the_preset():
    args = config(preset="paper_v1", gamma_sign="neg", fai_max_distance=-1, scheme="local", rhythm_lambda=0.3)
    assert (args.scheme, args.rhythm_lambda, args.gamma_sign, args.horizon) == ("local", 0.3, "neg", (10, None))


@pytest.mark.parametrize(
    ("scheme", "rhythm_lambda", "reads", "calibrates"),
    [
        ("none", 0.0, False, False),
        ("random", 0.0, False, False),
        ("entropy_bottom", 0.0, False, False),
        ("coupled", 0.0, True, False),
        ("global_bottom", 0.0, True, False),
        ("none", 0.1, True, True),
    ],
)
def test_what_is_read(scheme, rhythm_lambda, reads, calibrates):
    args = config(scheme=scheme, rhythm_lambda=rhythm_lambda)
    assert (args.reads_attention, args.calibrates) == (reads, calibrates)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"preset": "paper_v3"}, "preset", "paper_v3"),
        ({"scheme": "anchors"}, "scheme", "anchors"),
        ({"rhythm_lambda": -0.1}, "rhythm_lambda", "-0.1"),
        ({"rhythm_lambda": float("nan")}, "rhythm_lambda", "nan"),
        ({"head_scope": "group"}, "head_scope", "group"),
        ({"reward_head_scope": "fixed"}, "reward_head_scope", "fixed"),
        ({"calibration_responses": 0}, "calibration_responses", "0"),
        ({"calibration_refresh": -1}, "calibration_refresh", "-1"),
        ({"head_pool": "top"}, "head_pool", "top"),
        ({"head_fraction": 0.0}, "head_fraction", "0.0"),
        ({"waad_window": 0}, "waad_window", "0"),
        ({"waad_window": 1, "row_offset": -1}, "waad_window", "1"),
        ({"fai_min_distance": -1}, "fai_min_distance", "-1"),
        ({"fai_max_distance": 5}, "fai_max_distance", "5"),
        ({"fai_tail": "shrink"}, "fai_tail", "shrink"),
        ({"row_offset": 1}, "row_offset", "1"),
        ({"row_offset": -1, "rhythm_lambda": 0.1}, "row_offset", "-1"),
        ({"amplification": 0.5}, "amplification", "0.5"),
        ({"top_fraction": 1.5}, "top_fraction", "1.5"),
        ({"delta_mode": "rise"}, "delta_mode", "rise"),
        ({"intro_mode": "first"}, "intro_mode", "first"),
        ({"alpha": 2.0}, "alpha", "2.0"),
        ({"lookback": 0}, "lookback", "0"),
        ({"tau_waad": -0.1}, "tau_waad", "-0.1"),
        ({"tau_delta": 1.1}, "tau_delta", "1.1"),
        ({"overlap": "sum"}, "overlap", "sum"),
        ({"gamma_sign": "positive"}, "gamma_sign", "positive"),
        ({"renorm": "sum1"}, "renorm", "sum1"),
        ({"reward_mode": "dense"}, "reward_mode", "dense"),
        ({"reward_gate": "correct"}, "reward_gate", "correct"),
        ({"reward_norm": "mean"}, "reward_norm", "mean"),
        ({"reward_segment": "line"}, "reward_segment", "line"),
        ({"sink_tokens": -1}, "sink_tokens", "-1"),
        ({"loss_type": "luspo"}, "loss_type", "luspo"),
        ({"loss_type": "vespo", "scheme": "none", "rhythm_lambda": 0.1, "reward_mode": "token"}, "loss_type", "vespo"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level", "sequence"),
        ({"rhythm_lambda": 0.1, "reward_mode": "total", "scale_rewards": "batch"}, "scale_rewards", "batch"),
        (
            {
                "rhythm_lambda": 0.1,
                "reward_mode": "total",
                "multi_objective_aggregation": "normalize_then_sum",
            },
            "multi_objective_aggregation",
            "normalize_then_sum",
        ),
        ({"save_steps": 3, "steps_per_generation": 2, "num_generations": 2}, "save_steps", "3"),
    ],
)
def test_refusals_name_field_value_and_fix(options, field, value):
    with pytest.raises(ValueError, match=rf"{field}=\W?{value}.*([Ss]et|raise|published)"):
        config(**options)


@pytest.mark.parametrize("options", [{"loss_type": "luspo"}, {"importance_sampling_level": "sequence"}])
def test_one_advantage_per_response_goes_with_every_loss(options):
    assert config(scheme="none", **options).scheme == "none"
    assert config(preset="rhythm_reward", **options).rhythm_lambda == 0.1
