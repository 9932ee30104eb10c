"""What AttnPO logs, under `attnpo/`. Shares lie in [0, 1], lengths are in tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .responses import ScoredResponse


KINDS = ("turn", "forward", "summary", "final", "paragraph")
EXCLUSIONS = ("no_end_of_thinking", "several_end_of_thinking", "no_answer", "too_few_steps")

Totals = dict[str, tuple[float, float]]
"""Sum and count of each value: means over ranks are sums of sums over sums of counts."""


def _flags(values: Sequence[bool]) -> tuple[float, float]:
    return float(sum(values)), float(len(values))


def credit_totals(responses: Sequence[ScoredResponse]) -> Totals:
    """Sums and counts over this rank's responses; the names are the same for any responses.

    - `correct_rescaled`: of the correct responses, those with a scaled step; `correct_negative`: with A < 0.
    - `steps_attenuated`, `tokens_attenuated`: of the steps and their tokens in correct responses, those with a
      positive advantage that lost credit (PA); `steps_protected`, `tokens_protected`: those with a negative one that
      were spared (NA). `scale_attenuated`: mean γ under PA.
    - `score_to_baseline`: mean S / S_base; `score/<kind>`: mean S of the steps of a kind; `step_share/<kind>`: share
      of the steps.
    - `phrases/turn`, `phrases/summary`: such phrases per 1000 tokens of thinking.
    - `excluded/<reason>`: responses without usable steps.
    """
    usable = [r for r in responses if r.alignment.reason is None]
    correct = [r for r in responses if r.correct]
    open_to_credit = [r for r in usable if r.correct]
    totals: Totals = {
        "correct_rescaled": _flags([bool(r.scaled.any()) for r in correct]),
        "correct_negative": _flags([r.advantage < 0 for r in correct]),
        "steps_per_response": (float(sum(len(r.alignment.kinds) for r in usable)), float(len(usable))),
        "answer_share": (sum(r.answer_length / r.sequence_length for r in usable), float(len(usable))),
        "thinking_tokens": (
            float(sum(len(r.completion_ids) - r.answer_length for r in responses)),
            float(len(responses)),
        ),
    }
    num_steps = float(sum(len(r.alignment.kinds) for r in open_to_credit))
    num_tokens = float(sum(int(r.step_lengths.sum()) for r in open_to_credit))
    for name, chosen in {
        "attenuated": [r for r in open_to_credit if r.advantage > 0],
        "protected": [r for r in open_to_credit if r.advantage < 0],
    }.items():
        totals[f"steps_{name}"] = float(sum(int(r.scaled.sum()) for r in chosen)), num_steps
        totals[f"tokens_{name}"] = float(sum(int(r.step_lengths[r.scaled].sum()) for r in chosen)), num_tokens
    attenuated = [r.scales[r.scaled] for r in open_to_credit if r.advantage > 0 and r.scales is not None]
    totals["scale_attenuated"] = (
        float(sum(scales.sum().item() for scales in attenuated)),
        float(sum(len(scales) for scales in attenuated)),
    )
    totals |= _score_totals(usable)
    counted = [r for r in usable if r.phrases]
    thousands = sum(int(r.step_lengths.sum()) for r in counted) / 1000.0
    for kind in ("turn", "summary"):
        totals[f"phrases/{kind}"] = float(sum(r.phrases[kind] for r in counted)), thousands
    for reason in EXCLUSIONS:
        totals[f"excluded/{reason}"] = _flags([r.alignment.reason == reason for r in responses])
    return totals


def _score_totals(usable: Sequence[ScoredResponse]) -> Totals:
    totals: Totals = {}
    scored = [r for r in usable if r.scores is not None]
    with_baseline = [r for r in scored if r.baseline]
    totals["score_to_baseline"] = (
        sum(r.scores.sum().item() / r.baseline for r in with_baseline),
        float(sum(len(r.scores) for r in with_baseline)),
    )
    num_steps = float(sum(len(r.alignment.kinds) for r in usable))
    for kind in KINDS:
        scores = [
            score
            for r in scored
            for score, of_kind in zip(r.scores.tolist(), r.alignment.kinds, strict=True)
            if of_kind == kind
        ]
        totals[f"score/{kind}"] = sum(scores), float(len(scores))
        totals[f"step_share/{kind}"] = float(sum(r.alignment.kinds.count(kind) for r in usable)), num_steps
    return totals


def group_metrics(correct: Tensor, lengths: Tensor) -> dict[str, float]:
    """Accuracy and length by the length of a response within its group, and by the accuracy of the group.

    Args:
        correct: (P, G) 1 or 0; NaN for responses that could not be scored, which count as wrong here.
        lengths: (P, G) tokens of each response.

    Returns:
        `accuracy`; `groups_all_correct`; `length_group/{short,median,long}/{accuracy_mean,length_mean}`, the thirds of
        each group by length; `accnum_group/{low,mid,high}/{proportion,length_mean}`, prompts with fewer than G/3,
        fewer than 2G/3 and more correct responses. NaN for the length of a class without prompts.
    """
    right, length = correct.nan_to_num(nan=0.0).double(), lengths.double()
    group = right.shape[-1]
    values = {
        "accuracy": right.mean().item(),
        "groups_all_correct": (right.sum(-1) == group).double().mean().item(),
    }
    order = length.argsort(dim=-1, stable=True)
    third = torch.arange(group, device=order.device) * 3 // group  # of each rank by length
    for index, name in enumerate(("short", "median", "long")):
        members = order[:, third == index]  # (P, members)
        values[f"length_group/{name}/accuracy_mean"] = right.gather(-1, members).mean().item()
        values[f"length_group/{name}/length_mean"] = length.gather(-1, members).mean().item()
    count = right.sum(-1)  # (P,)
    classes = {
        "low": count < group / 3,
        "mid": (count >= group / 3) & (count < 2 * group / 3),
        "high": count >= 2 * group / 3,
    }
    for name, prompts in classes.items():
        values[f"accnum_group/{name}/proportion"] = prompts.double().mean().item()
        values[f"accnum_group/{name}/length_mean"] = length[prompts].mean().item()
    return values
