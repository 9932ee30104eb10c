"""What a model is asked about the steps of one response: labels by likelihood, and the scores of all its heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention import KeyFocusObserver, decoder_of, forward_for_attention
from ..alignment import StepAlignment
from .labels import REDUNDANT, LabelledCompletion, concludes_answer, label_after_answer, label_by_likelihood


@dataclass
class Candidate:
    """A response that may be labelled."""

    problem: str
    answer: str
    completion_ids: list[int]
    alignment: StepAlignment
    labels: list[str | None] | None = None  # where the data gives them


@torch.no_grad()
def answer_logps(
    model: PreTrainedModel, sequences: Sequence[list[int]], answer_length: int, batch_size: int
) -> list[float]:
    """log p of the last `answer_length` tokens of each sequence, teacher-forced, in nats."""
    device = next(model.parameters()).device
    logps = []
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T), padded on the left
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            logits_to_keep=answer_length + 1,
            use_cache=False,
        ).logits[:, :-1]  # (B, F, V)
        targets = ids[:, -answer_length:, None].to(device)
        logps += logits.float().log_softmax(dim=-1).gather(-1, targets).sum(dim=(1, 2)).tolist()
    return logps


def removal_drops(
    model: PreTrainedModel, prompt_ids: list[int], candidate: Candidate, num_steps: int, batch_size: int
) -> list[float]:
    """log p(answer | steps) - log p(answer | steps without this one) of each of the first `num_steps` steps, in nats.

    The later steps are left out throughout.
    """
    ids, ranges = candidate.completion_ids, candidate.alignment.step_ranges[:num_steps]
    end_of_thinking = candidate.alignment.step_ranges[-1][1]
    tail = ids[end_of_thinking:]  # `</think>` and the answer
    thinking = ids[: ranges[-1][1]]
    shortened = [prompt_ids + thinking[:start] + thinking[end:] + tail for start, end in ranges]
    answer_length = len(ids) - candidate.alignment.answer_start
    whole, *without = answer_logps(model, [prompt_ids + thinking + tail, *shortened], answer_length, batch_size)
    return [whole - one for one in without]


def label_steps(model: PreTrainedModel, prompt_ids: list[int], candidate: Candidate, batch_size: int):
    """Labels by position and by likelihood: redundant by either, essential by likelihood, final steps left out.

    Returns:
        A label or None per step.
    """
    alignment = candidate.alignment
    concludes = [concludes_answer(text, candidate.answer) for text in alignment.texts]
    by_position = label_after_answer(concludes, alignment.kinds)
    derivation = next((i for i, one in enumerate(concludes) if one), len(concludes) - 1)
    drops = removal_drops(model, prompt_ids, candidate, derivation + 1, batch_size)
    by_likelihood = label_by_likelihood(drops) + [None] * (len(concludes) - len(drops))
    return [
        None if kind == "final" else REDUNDANT if position == REDUNDANT else likelihood
        for kind, position, likelihood in zip(alignment.kinds, by_position, by_likelihood, strict=True)
    ]


def score_all_heads(
    model: PreTrainedModel, prompt_ids: list[int], response: LabelledCompletion, answer_start: int
) -> Tensor:
    """(layers · heads, num_steps) attention of the answer to each step, of every head."""
    config = decoder_of(model).config
    heads = [(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
    device = next(model.parameters()).device
    ids = torch.tensor([prompt_ids + response.completion_ids], device=device)  # (1, L)
    offset = len(prompt_ids)
    ranges = [(offset + start, offset + end) for start, end in response.step_ranges]
    mask = torch.ones_like(ids)
    observer = KeyFocusObserver(mask, [ranges], [offset + answer_start], heads, average=False)
    forward_for_attention(model, ids, mask, observer)
    return observer.result()[0].cpu()
