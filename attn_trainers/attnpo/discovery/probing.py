"""What a model is asked about the steps of one response: labels by likelihood, and the scores of all its heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention import KeyFocusObserver, decoder_of, forward_for_attention
from ..alignment import StepAlignment
from .labels import (
    BY_LIKELIHOOD,
    GIVEN,
    REDUNDANT,
    LabelledCompletion,
    LikelihoodThresholds,
    first_derivation,
    label_after_answer,
    label_by_likelihood,
)
from .pairs import ScoredSteps


LOGITS_AT_ONCE = 2**28
"""Logits (rows · answer tokens · vocabulary) of one forward: 0.5 GB in bfloat16."""

POSITIONS_AT_ONCE = 64
"""Answer tokens whose logits are taken to float32 at once: 0.3 GB for 8 rows of a vocabulary of 150,000."""


@dataclass
class Candidate:
    """A response that may be labelled.

    Attributes:
        problem: the problem.
        answer: its reference answer; empty where the data has none.
        completion_ids: the sampled token ids.
        alignment: its steps.
        labels: label or None of each step, where the data gives them.
        label_source: who made them.
    """

    problem: str
    answer: str
    completion_ids: list[int]
    alignment: StepAlignment
    labels: list[str | None] | None = None
    label_source: str = GIVEN


@dataclass
class ProbedResponse:
    """A labelled response with the scores of all heads.

    Attributes:
        prompt_ids: token ids of its prompt.
        answer_start: first token of the answer, relative to the completion; the answer ends with it.
        response: the completion and its labels.
        scores: (layers · heads, S) attention of the answer to each step.
    """

    prompt_ids: list[int]
    answer_start: int
    response: LabelledCompletion
    scores: Tensor

    @property
    def ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt_ids + self.response.completion_ids

    @property
    def step_ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of the steps in `ids`."""
        return [(len(self.prompt_ids) + start, len(self.prompt_ids) + end) for start, end in self.response.step_ranges]

    @property
    def scored_steps(self) -> ScoredSteps:
        """What the ranking needs of it."""
        derivation = self.response.derivation
        if derivation is None and self.response.label_source == BY_LIKELIHOOD:
            derivation = len(self.response.labels)  # no label is one of position
        return ScoredSteps(
            scores=self.scores,
            essential=self.response.essential,
            redundant=self.response.redundant,
            lengths=torch.tensor([end - start for start, end in self.response.step_ranges]),
            problem=self.response.problem,
            derivation=derivation,
        )


def chunked_logps(logits: Tensor, targets: Tensor, positions: int = POSITIONS_AT_ONCE) -> Tensor:
    """log p of the targets, some positions at a time, so that no float32 copy of all logits is made.

    Args:
        logits: (B, F, V).
        targets: (B, F) token ids.
        positions: positions at once.

    Returns:
        (B, F) float32, in nats.
    """
    logps = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    for start in range(0, targets.shape[1], positions):
        chunk = logits[:, start : start + positions].float()  # (B, C, V)
        wanted = chunk.gather(-1, targets[:, start : start + positions, None])[..., 0]
        logps[:, start : start + positions] = wanted - chunk.logsumexp(dim=-1)
    return logps


def batches(sequences: Sequence[list[int]], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask, (B, T) each, padded on the left, of `rows` sequences at a time."""
    for start in range(0, len(sequences), rows):
        batch = sequences[start : start + rows]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(batch):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        yield ids, mask


def rows_at_once(model: PreTrainedModel, answer_length: int, batch_size: int) -> int:
    """`batch_size`, or fewer rows where the logits of long answers would need more memory than `LOGITS_AT_ONCE`."""
    one_row = (answer_length + 1) * model.get_output_embeddings().weight.shape[0]
    return max(1, min(batch_size, LOGITS_AT_ONCE // one_row))


@torch.no_grad()
def answer_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, answer_length: int) -> Tensor:
    """(B, F, V) logits of the last `answer_length` tokens of each row of (B, T) ids, padded on the left."""
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
        logits_to_keep=answer_length + 1,
        use_cache=False,
    ).logits[:, :-1]


def answer_logps(
    model: PreTrainedModel, sequences: Sequence[list[int]], answer_length: int, batch_size: int
) -> list[float]:
    """Mean log p of the last `answer_length` tokens of each sequence, teacher-forced, in nats per token."""
    device = next(model.parameters()).device
    logps: list[float] = []
    for ids, mask in batches(sequences, rows_at_once(model, answer_length, batch_size)):
        ids = ids.to(device)
        logits = answer_logits(model, ids, mask.to(device), answer_length)
        logps += chunked_logps(logits, ids[:, -answer_length:]).double().mean(dim=1).tolist()
    return logps


def removal_drops(
    model: PreTrainedModel, prompt_ids: list[int], candidate: Candidate, num_steps: int, batch_size: int
) -> list[float]:
    """What the answer loses without each of the first `num_steps` steps, in nats per answer token.

    That is log p(answer | steps) - log p(answer | steps without this one), the later steps left out throughout.
    """
    ids, ranges = candidate.completion_ids, candidate.alignment.step_ranges[:num_steps]
    end_of_thinking = candidate.alignment.step_ranges[-1][1]
    tail = ids[end_of_thinking:]  # `</think>` and the answer
    thinking = ids[: ranges[-1][1]]
    shortened = [prompt_ids + thinking[:start] + thinking[end:] + tail for start, end in ranges]
    answer_length = len(ids) - candidate.alignment.answer_start
    whole, *without = answer_logps(model, [prompt_ids + thinking + tail, *shortened], answer_length, batch_size)
    return [whole - one for one in without]


def label_steps(
    model: PreTrainedModel,
    prompt_ids: list[int],
    candidate: Candidate,
    batch_size: int,
    thresholds: LikelihoodThresholds | None = None,
) -> tuple[list[str | None], list[float]]:
    """Labels by position and by likelihood: redundant by either, essential by likelihood, final steps left out.

    Returns:
        A label or None per step, and the `removal_drops` of the steps up to the derivation.
    """
    alignment = candidate.alignment
    derivation = first_derivation(alignment.texts, candidate.answer, candidate.problem)
    probed = len(alignment.texts) if derivation is None else derivation + 1
    drops = removal_drops(model, prompt_ids, candidate, probed, batch_size)
    by_likelihood = label_by_likelihood(drops, thresholds) + [None] * (len(alignment.texts) - probed)
    by_position = label_after_answer(alignment.kinds, derivation)
    labels = [
        None if kind == "final" else REDUNDANT if position == REDUNDANT else likelihood
        for kind, position, likelihood in zip(alignment.kinds, by_position, by_likelihood, strict=True)
    ]
    return labels, drops


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
