import math

import pytest
import torch

from attn_trainers.attnpo.alignment import StepAlignment
from attn_trainers.attnpo.metrics import credit_totals, group_metrics
from attn_trainers.attnpo.responses import ScoredResponse


def test_group_metrics_in_closed_form():
    correct = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, math.nan, 1, 1, 1]])
    lengths = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [9, 9, 9, 9, 9, 9], [1, 1, 1, 1, 1, 1]])
    values = group_metrics(list(zip(correct, lengths, strict=True)))
    assert values["accuracy"] == pytest.approx(15 / 24)
    assert values["groups_all_correct"] == 1 / 4
    # Shortest two of each group: 1 of 2, 0 of 2, 2 of 2, 2 of 2.
    assert values["length_group/short/accuracy_mean"] == pytest.approx(5 / 8)
    assert values["length_group/short/length_mean"] == pytest.approx((1 + 2 + 1 + 2 + 9 + 9 + 1 + 1) / 8)
    assert values["length_group/long/length_mean"] == pytest.approx((5 + 6 + 5 + 6 + 9 + 9 + 1 + 1) / 8)
    assert [values[f"accnum_group/{name}/proportion"] for name in ("low", "mid", "high")] == [0.25, 0.25, 0.5]
    assert [values[f"accnum_group/{name}/length_mean"] for name in ("low", "mid", "high")] == [3.5, 3.5, 5.0]


def response(
    kinds: list[str], scores: list[float], scales: list[float] | None, advantage: float, **fields
) -> ScoredResponse:
    """Steps of two tokens each, `</think>`, an answer of two tokens, after a prompt of two."""
    factors = None if scales is None else torch.tensor(scales)
    ones = None if scales is None else torch.ones(len(scales))
    ranges = [(2 * i, 2 * i + 2) for i in range(len(kinds))]
    alignment = StepAlignment(ranges, kinds, ["text"] * len(kinds), answer_start=2 * len(kinds) + 1)
    return ScoredResponse(
        [1, 1],
        [1] * (2 * len(kinds) + 3),
        alignment,
        torch.tensor(scores),
        positive_scales=factors if advantage > 0 else ones,
        negative_scales=factors if advantage < 0 else ones,
        advantages=[advantage] * (2 * len(kinds) + 3),
        **fields,
    )


def test_credit_totals_in_closed_form():
    good = {"correct": True, "advantage": 0.5, "baseline": 0.1, "phrases": {"turn": 3, "summary": 1}}
    long = {"correct": True, "advantage": -0.5, "baseline": 0.2, "phrases": {"turn": 1, "summary": 1}}
    responses = [
        response(["forward", "turn", "turn"], [0.2, 0.05, 0.15], [1.0, 0.5, 1.0], **good),
        response(["forward", "summary"], [0.1, 0.4], [1.0, 0.0], **long),
        response(["forward", "turn"], [0.1, 0.1], None, correct=False, advantage=-0.5, baseline=0.2),
        ScoredResponse([1], [1, 1, 1], StepAlignment(reason="no_end_of_thinking")),
        ScoredResponse([1], [], StepAlignment(reason="no_end_of_thinking"), correct=True, advantages=[0.1]),
    ]
    totals = credit_totals(responses)
    assert totals["correct_rescaled"] == (2.0, 3.0)
    assert totals["correct_negative"] == (1.0, 3.0)
    assert totals["steps_per_response"] == (7.0, 3.0)
    assert totals["steps_attenuated"] == (1.0, 5.0) and totals["tokens_attenuated"] == (2.0, 10.0)
    assert totals["steps_protected"] == (1.0, 5.0) and totals["tokens_protected"] == (2.0, 10.0)
    assert totals["scale_attenuated"] == (0.5, 1.0)
    assert totals["score_to_baseline"] == pytest.approx((4.0 + 2.5 + 1.0, 7.0))
    assert totals["score/turn"] == pytest.approx((0.05 + 0.15 + 0.1, 3.0))
    assert totals["step_share/turn"] == (3.0, 7.0) and totals["step_share/final"] == (0.0, 7.0)
    assert totals["answer_share"] == pytest.approx((2 / 11 + 2 / 9 + 2 / 9, 3.0))
    assert totals["thinking_tokens"] == (7.0 + 5.0 + 5.0 + 3.0 + 0.0, 5.0)
    assert totals["phrases/turn"] == (4.0, 0.01) and totals["phrases/summary"] == (2.0, 0.01)
    assert totals["excluded/no_end_of_thinking"] == (2.0, 5.0) and totals["excluded/no_answer"] == (0.0, 5.0)


def test_names_do_not_depend_on_the_responses():
    assert list(credit_totals([])) == list(credit_totals([response(["turn"], [0.1], [1.0], 0.0, correct=True)]))
