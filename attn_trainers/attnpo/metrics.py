"""What AttnPO logs, under `attnpo/`. Shares lie in [0, 1], lengths are in tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.ranks import Totals
from .responses import ScoredResponse


KINDS = ("turn", "forward", "summary", "final", "paragraph")
EXCLUSIONS = ("no_end_of_thinking", "several_end_of_thinking", "no_answer", "too_few_steps")


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
        "correct_rescaled": _flags([bool((r.attenuated | r.protected).any()) for r in correct]),
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
    for name in ("attenuated", "protected"):
        scaled = [(r.step_lengths, getattr(r, name)) for r in open_to_credit]
        totals[f"steps_{name}"] = float(sum(int(steps.sum()) for _, steps in scaled)), num_steps
        totals[f"tokens_{name}"] = float(sum(int(lengths[steps].sum()) for lengths, steps in scaled)), num_tokens
    attenuated = [r.positive_scales[r.attenuated] for r in open_to_credit if r.positive_scales is not None]
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


def group_metrics(groups: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and length by the length of a response within its group, and by the accuracy of the group.

    Args:
        groups: per prompt its G responses: (G,) 1 or 0, NaN for one that could not be scored, which counts as wrong
            here; and (G,) tokens.

    Returns:
        `accuracy`; `groups_all_correct`; `length_group/{short,median,long}/{accuracy_mean,length_mean}`, the thirds of
        each group by length; `accnum_group/{low,mid,high}/{proportion,length_mean}`, prompts with fewer than G/3,
        fewer than 2G/3 and more correct responses. NaN for the length of a class without prompts.
    """
    by_length: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ("short", "median", "long")}
    by_accuracy: dict[str, list[Tensor]] = {name: [] for name in ("low", "mid", "high")}
    all_right = []
    for correct, lengths in groups:
        right, length = correct.nan_to_num(nan=0.0).double().cpu(), lengths.double().cpu()
        size, count = len(right), right.sum().item()
        order = length.argsort(stable=True)
        for index, name in enumerate(by_length):
            members = order[torch.arange(size) * 3 // size == index]
            by_length[name].append((right[members], length[members]))
        by_accuracy["low" if count < size / 3 else "mid" if count < 2 * size / 3 else "high"].append(length)
        all_right.append(right)
    values = {
        "accuracy": torch.cat(all_right).mean().item(),
        "groups_all_correct": sum(bool(right.all()) for right in all_right) / len(all_right),
    }
    for name, parts in by_length.items():
        right, length = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        values[f"length_group/{name}/accuracy_mean"] = right.mean().item()
        values[f"length_group/{name}/length_mean"] = length.mean().item()
    for name, lengths in by_accuracy.items():
        values[f"accnum_group/{name}/proportion"] = len(lengths) / len(groups)
        values[f"accnum_group/{name}/length_mean"] = torch.cat(lengths).mean().item() if lengths else float("nan")
    return values
