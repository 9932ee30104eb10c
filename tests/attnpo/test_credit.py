"""Rewards, advantages and step scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnpo.credit import (
    baseline_score,
    length_penalised_rewards,
    rloo_advantages,
    step_scales,
    token_factors,
)


def test_rewards_and_advantages_of_a_mixed_group():
    rewards = length_penalised_rewards(torch.tensor([1, 1, 1, 0]), torch.tensor([100, 200, 300, 700]))
    shift = 0.2 * (1 / (1 + math.exp(-math.sqrt(1.5))) - 0.5)  # lengths lie sqrt(3/2) deviations from their mean
    assert 0.9 + shift == pytest.approx(0.954579, abs=1e-6)
    torch.testing.assert_close(rewards, torch.tensor([0.9 + shift, 0.9, 0.9 - shift, 0.0]))
    expected = torch.tensor([0.3 + 4 / 3 * shift, 0.3, 0.3 - 4 / 3 * shift, -0.9])
    torch.testing.assert_close(expected, torch.tensor([0.372773, 0.3, 0.227227, -0.9]), atol=1e-6, rtol=0)
    torch.testing.assert_close(rloo_advantages(rewards), expected)


def test_rewards_and_advantages_of_an_all_correct_group():
    lengths = torch.tensor([1000, 1100, 1200, 1300, 1400, 1500, 1600, 4000])
    rewards = length_penalised_rewards(torch.ones(8, dtype=torch.bool), lengths)
    expected = torch.tensor([0.9336, 0.9286, 0.9235, 0.9183, 0.9129, 0.9075, 0.9021, 0.8140])
    torch.testing.assert_close(rewards, expected, atol=5e-5, rtol=0)
    expected = torch.tensor([0.0326, 0.0269, 0.0211, 0.0151, 0.0090, 0.0028, -0.0034, -0.1041])
    torch.testing.assert_close(rloo_advantages(rewards), expected, atol=5e-5, rtol=0)


def test_groups_are_independent():
    correct = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    lengths = torch.tensor([[5, 16001, 7, 9], [1, 2, 3, 4], [16001] * 4, [100, 200, 300, 700]])
    rewards = length_penalised_rewards(correct, lengths)
    assert rewards[0].tolist() == pytest.approx([0, 0.9, 0, 0])
    assert rewards[1].tolist() == [0.0] * 4
    assert rewards[2].tolist() == pytest.approx([0.9] * 4)
    for row in range(4):
        assert torch.equal(rewards[row], length_penalised_rewards(correct[row], lengths[row]))
    advantages = rloo_advantages(rewards)
    assert advantages[0].tolist() == pytest.approx([-0.3, 0.9, -0.3, -0.3])
    assert advantages[1].tolist() == advantages[2].tolist() == [0.0] * 4


def test_penalty_weight():
    correct, lengths = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([10, 30, 20])
    assert length_penalised_rewards(correct, lengths, penalty=0.0).tolist() == [1.0, 1.0, 0.0]
    sigmoid = 1 / (1 + math.exp(1))
    expected = [1 - 0.5 * sigmoid, 1 - 0.5 * (1 - sigmoid), 0.0]
    assert length_penalised_rewards(correct, lengths, penalty=0.5).tolist() == pytest.approx(expected)


@settings(deadline=None, max_examples=100)
@given(rewards=st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_rloo_is_the_reward_less_the_mean_of_the_others(rewards):
    advantages = rloo_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    for index, advantage in enumerate(advantages):
        others = rewards[:index] + rewards[index + 1 :]
        assert advantage == pytest.approx(rewards[index] - sum(others) / len(others), abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 16384), min_size=8, max_size=8), num_wrong=st.integers(1, 7))
def test_in_a_mixed_group_of_eight_correct_responses_gain(lengths, num_wrong):
    correct = torch.tensor([0.0] * num_wrong + [1.0] * (8 - num_wrong))
    advantages = rloo_advantages(length_penalised_rewards(correct, torch.tensor(lengths)))
    assert (advantages[num_wrong:] > 0.026).all() and (advantages[:num_wrong] < 0).all()


CASE = {"accuracy": 0.75, "answer_length": 40, "sequence_length": 400}


def scales(scores, advantage, **options):
    return step_scales(
        torch.tensor(scores, dtype=torch.float64), advantage, **{"progress": 1.0, **CASE, **options}
    ).tolist()


def test_baseline():
    assert baseline_score(**CASE) == pytest.approx(0.05625)
    assert baseline_score(**CASE, baseline_power=0.0) == pytest.approx(0.1)


def test_redundant_steps_of_a_positive_response_are_attenuated():
    base = baseline_score(**CASE)
    assert scales([0.028125, base, 0.2, 0.0], 0.3) == pytest.approx([0.71875, 1.0, 1.0, 0.4375])
    assert scales([0.028125], 0.3, floor=0.5) == pytest.approx([0.859375])
    assert scales([base * (1 - 1e-9)], 0.3) == pytest.approx([1.0], abs=1e-8)
    assert scales([0.03], 0.3, accuracy=1.0) == pytest.approx([0.3])


def test_schedule_is_strict():
    assert scales([0.028125], 0.3, progress=250 / 1000) == [1.0]
    assert scales([0.028125], 0.3, progress=251 / 1000) == pytest.approx([0.71875])
    for accuracy, last_idle in ((0.5, 500), (0.125, 875), (1.0, 0)):
        assert scales([0.0], 0.3, accuracy=accuracy, progress=last_idle / 1000) == [1.0]
        active = scales([0.0], 0.3, accuracy=accuracy, progress=(last_idle + 1) / 1000)
        assert active == pytest.approx([1 - accuracy**2])


def test_essential_steps_of_a_negative_response_are_spared_at_any_progress():
    base = baseline_score(**CASE)
    scores = [base, base * 1.001, 0.9, 0.0]
    assert scales(scores, -0.3, progress=0.0) == scales(scores, -0.3) == [1.0, 0.0, 0.0, 1.0]
    # The published worked example: a correct response with advantage -0.4 and steps of low, high, high, low score.
    example = step_scales(torch.tensor([0.05, 0.2, 0.3, 0.01]), -0.4, progress=0.001, **{**CASE, "accuracy": 1.0})
    assert (-0.4 * example).tolist() == pytest.approx([-0.4, 0.0, 0.0, -0.4])


def test_ablations():
    assert scales([0.028125], 0.3, attenuate_positive=False) == [1.0]
    assert scales([0.9], -0.3, protect_negative=False) == [1.0]
    assert scales([0.028125], 0.3, baseline_power=0.0) == pytest.approx([0.5625 * 0.28125 + 0.4375])
    assert scales([0.028125], 0.3, attenuation_power=0.0) == pytest.approx([0.5])
    assert scales([0.028125], 0.3, accuracy=0.125, progress=math.inf) == [1.0]
    assert scales([0.0], 0.3, accuracy=0.125, progress=math.inf) == pytest.approx([1 - 1 / 64])


def test_uniform_attention_touches_nothing_and_spares_everything():
    prompt, response, answer = 20, 180, 30
    length = prompt + response
    uniform = sum(1 / (row + 1) for row in range(length - answer, length))
    assert uniform == pytest.approx(math.log(200.5 / 170.5), abs=1e-6)
    assert uniform > answer / length == 0.15
    options = {"accuracy": 1.0, "answer_length": answer, "sequence_length": length, "progress": 1.0}
    scores = torch.full((5,), uniform)
    assert step_scales(scores, 0.2, **options).tolist() == [1.0] * 5
    assert step_scales(scores, -0.2, **options).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("scores", "advantage", "options", "expected"),
    [
        ([], 0.3, {}, []),
        ([0.0, 0.9], 0.0, {}, [1.0, 1.0]),
        ([math.nan, math.nan], 0.3, {}, [1.0, 1.0]),
        ([math.nan], -0.3, {}, [1.0]),
        ([0.0, 0.1], 0.3, {"accuracy": 0.0}, [1.0, 1.0]),
        ([0.0, 0.1], 0.3, {"answer_length": 0}, [1.0, 1.0]),
        ([0.1], math.nan, {}, [1.0]),
    ],
)
def test_edges(scores, advantage, options, expected):
    got = scales(scores, advantage, **options)
    assert got == expected


def test_scales_are_constants_in_single_precision():
    scores = torch.tensor([0.01, 0.2], dtype=torch.bfloat16, requires_grad=True)
    got = step_scales(scores, 0.3, progress=1.0, **CASE)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert not rloo_advantages(torch.rand(4, requires_grad=True)).requires_grad


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    advantage=st.floats(-1, 1),
    accuracy=st.floats(0, 1),
    progress=st.floats(0, 2),
    floor=st.floats(0, 1),
)
def test_scales_never_amplify_or_change_sign(scores, advantage, accuracy, progress, floor):
    got = scales(scores, advantage, accuracy=accuracy, progress=progress, floor=floor)
    assert all(0.0 <= scale <= 1.0 + 1e-12 for scale in got)
    # A step with a higher score never keeps less of a gain nor more of a loss.
    ordered = [scale for _, scale in sorted(zip(scores, got, strict=True))]
    for lower, higher in zip(ordered[:-1], ordered[1:], strict=True):
        assert lower <= higher + 1e-12 if advantage > 0 else lower >= higher


def test_token_factors():
    got = token_factors(torch.tensor([0.5, 0.25]), [(0, 2), (2, 5)], 8)
    assert got.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0]
    assert token_factors(torch.zeros(0), [], 3).tolist() == [1.0, 1.0, 1.0]


def test_bad_arguments_are_refused():
    scores = torch.tensor([0.1])
    for options, message in (
        ({"accuracy": 1.5}, "accuracy=1.5"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"answer_length": 401}, "answer_length=401"),
        ({"answer_length": 0, "sequence_length": 0}, "sequence_length=0"),
    ):
        with pytest.raises(ValueError, match=message):
            step_scales(scores, 0.3, **{**CASE, "progress": 1.0, **options})
    with pytest.raises(ValueError, match="2 scales for 1 step_ranges"):
        token_factors(torch.ones(2), [(0, 1)], 3)
    for ranges in ([(0, 2), (1, 3)], [(0, 2), (2, 2)], [(0, 2), (2, 9)], [(-1, 2), (2, 3)]):
        with pytest.raises(ValueError, match="step_ranges"):
            token_factors(torch.ones(2), ranges, 8)
    with pytest.raises(ValueError, match="num_generations"):
        rloo_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        length_penalised_rewards(torch.ones(3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="penalty=1.1"):
        length_penalised_rewards(torch.ones(3), torch.ones(3), penalty=1.1)
    with pytest.raises(ValueError, match="other values than 0 and 1"):
        length_penalised_rewards(torch.tensor([0.5]), torch.tensor([4]))


def test_leave_one_out_leaves_unscored_responses_out():
    nan = float("nan")
    advantages = rloo_advantages(torch.tensor([[0.9, nan, 0.3, 0.0], [nan, nan, 0.9, nan]]))
    torch.testing.assert_close(advantages, torch.tensor([[0.75, 0.0, -0.15, -0.6], [0.0, 0.0, 0.0, 0.0]]))
