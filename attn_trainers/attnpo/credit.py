"""Outcome reward, advantage and step scales of AttnPO (arXiv 2602.09953; numbers and defaults of its published code).

A correct response is rewarded for being short among the correct ones of its prompt, its advantage is taken against the
other responses of the prompt, and each of its reasoning steps scales that advantage by the attention the final answer
pays to it. Everything here is a constant of the loss: no gradient flows through it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def length_penalised_rewards(correct: Tensor, lengths: Tensor, penalty: float = 0.2) -> Tensor:
    """Correctness, less a penalty for length relative to the correct responses of the same prompt.

    r_i = c_i (1 - penalty · σ((len_i - μ) / (sd + 1e-8))), with μ and the population deviation sd over the lengths of
    the correct responses of the group. One correct response, or several of one length, get 1 - penalty / 2.

    Args:
        correct: (..., G) 1 or 0 (or bool), G responses to each prompt.
        lengths: (..., G) tokens of each response, end-of-sequence token included.
        penalty: weight of the length; 0 leaves correctness.

    Returns:
        (..., G) float32 rewards; 0 for wrong responses.

    Raises:
        ValueError: shapes differ, `correct` holds something else than 0 and 1, or `penalty` lies outside [0, 1].
    """
    if correct.shape != lengths.shape:
        raise ValueError(
            f"correct {tuple(correct.shape)} and lengths {tuple(lengths.shape)} differ in shape; give (..., G)."
        )
    if not 0.0 <= penalty <= 1.0:
        raise ValueError(
            f"penalty={penalty} is outside [0, 1]; set it within: a correct response is never worse than a wrong one."
        )
    # Double precision: equal lengths must give a deviation and differences of exactly zero, which 1e-8 would magnify.
    right, length = correct.detach().double(), lengths.detach().double()
    if not ((right == 0) | (right == 1)).all():
        raise ValueError("correct holds other values than 0 and 1; threshold graded rewards before penalising length.")
    count = right.sum(-1, keepdim=True).clamp(min=1.0)  # (..., 1)
    mean = (right * length).sum(-1, keepdim=True) / count
    deviation = ((right * (length - mean) ** 2).sum(-1, keepdim=True) / count).sqrt()
    relative = (length - mean) / (deviation + 1e-8)
    return (right * (1.0 - penalty * torch.sigmoid(relative))).float()


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Leave-one-out advantages: each reward less the mean of the others of its group, not divided by a deviation.

    Args:
        rewards: (..., G) rewards of the G responses to each prompt; NaN for a response that could not be scored.

    Returns:
        (..., G) advantages A_i = G / (G - 1) · (r_i - mean), in their dtype; exactly 0 where all are equal. Responses
        that could not be scored get 0 and do not count in G, and so does one that has no other to compare with.

    Raises:
        ValueError: G < 2.
    """
    group = rewards.shape[-1]
    if group < 2:
        raise ValueError(
            f"rewards have {group} response per prompt; leave-one-out needs num_generations of at least 2."
        )
    exact = rewards.detach().double()  # so that rounding gives no sign to the advantages of equal rewards
    scored = (~exact.isnan()).sum(-1, keepdim=True).double()  # (..., 1)
    centred = (exact - exact.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
    return (scored / (scored - 1.0).clamp(min=1.0) * centred).to(rewards.dtype)


def baseline_score(*, accuracy: float, answer_length: int, sequence_length: int, baseline_power: float = 2.0) -> float:
    """S_base = p^baseline_power · |F| / L: the score of a step under uniform attention, lowered for hard prompts.

    The answer's |F| tokens spread attention of total weight |F| over L tokens, so |F| / L is the mean score per token.
    """
    return accuracy**baseline_power * answer_length / sequence_length


def step_scales(
    step_scores: Tensor,
    advantage: float,
    *,
    accuracy: float,
    answer_length: int,
    sequence_length: int,
    progress: float,
    baseline_power: float = 2.0,
    attenuation_power: float = 2.0,
    floor: float = 0.0,
    attenuate_positive: bool = True,
    protect_negative: bool = True,
) -> Tensor:
    """Factor γ_k of each step of one correct response on the response's advantage. Wrong responses are not scaled.

    With S_base from `baseline_score`:

    - advantage > 0, S_k < S_base and progress > 1 - accuracy: γ_k = (1 - floor) g + floor, where
      g = p^attenuation_power · S_k / S_base + 1 - p^attenuation_power. Redundant steps lose credit, more so where the
      prompt is easy, and on hard prompts only late in training.
    - advantage < 0 and S_k > S_base: γ_k = 0, at any progress. Essential steps are spared the penalty.
    - else, equality and a NaN score included: γ_k = 1.

    The ablations: `attenuate_positive=False`, `protect_negative=False`, `baseline_power=0` and `attenuation_power=0`
    (no dependence on difficulty), `progress=math.inf` (no schedule).

    Args:
        step_scores: (num_steps,) attention of the final answer to each step: summed over answer tokens, averaged over
            the step's tokens and over heads.
        advantage: the response's advantage.
        accuracy: p, the share of correct responses to the prompt, in [0, 1].
        answer_length: |F|, tokens after `</think>`, end-of-sequence token included.
        sequence_length: L, tokens of prompt and response. (With the response alone the baseline
            is above the uniform level.)
        progress: optimizer steps done, the present one counted, divided by the schedule's length.
        baseline_power: exponent of the accuracy in S_base.
        attenuation_power: exponent of the accuracy in the attenuation.
        floor: least factor of an attenuated step, in [0, 1].
        attenuate_positive: scale steps of responses with a positive advantage.
        protect_negative: spare steps of responses with a negative advantage.

    Returns:
        (num_steps,) factors in [0, 1], float32 (float64 for float64 scores), without gradient.

    Raises:
        ValueError: `accuracy`, `floor` or the lengths are out of range.
    """
    for name, value in (("accuracy", accuracy), ("floor", floor)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value} is outside [0, 1]; set it to a share within.")
    if not 0 <= answer_length <= sequence_length or sequence_length == 0:
        raise ValueError(
            f"answer_length={answer_length} and sequence_length={sequence_length} do not fit; the "
            "answer is part of the sequence."
        )
    scores = step_scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()  # (num_steps,)
    ones = torch.ones_like(scores)
    base = baseline_score(
        accuracy=accuracy,
        answer_length=answer_length,
        sequence_length=sequence_length,
        baseline_power=baseline_power,
    )
    if advantage > 0 and attenuate_positive and base > 0 and progress > 1.0 - accuracy:
        strength = accuracy**attenuation_power
        attenuated = (1.0 - floor) * (strength * scores / base + 1.0 - strength) + floor
        return torch.where(scores < base, attenuated, ones)
    if advantage < 0 and protect_negative:
        return torch.where(scores > base, torch.zeros_like(scores), ones)
    return ones


def token_factors(scales: Tensor, step_ranges: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Spread the factors of steps over their tokens.

    Args:
        scales: (num_steps,) factors.
        step_ranges: half-open (start, end) token ranges of the steps, relative to the completion.
        length: tokens of the completion.

    Returns:
        (length,) factors in the dtype of the scales; 1 for tokens in no step (`</think>` and the answer).

    Raises:
        ValueError: the numbers of scales and ranges differ, or a range is empty, overlaps the one before or leaves the
            completion.
    """
    if len(scales) != len(step_ranges):
        raise ValueError(f"{len(scales)} scales for {len(step_ranges)} step_ranges; give one scale per step.")
    factors = scales.new_ones(length)
    previous_end = 0
    for scale, (start, end) in zip(scales.detach(), step_ranges, strict=True):
        if not previous_end <= start < end <= length:
            raise ValueError(
                f"step_ranges hold ({start}, {end}), which is empty, overlaps or leaves the {length} tokens."
            )
        factors[start:end] = scale
        previous_end = end
    return factors
