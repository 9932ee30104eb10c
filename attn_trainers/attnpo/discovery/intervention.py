"""A check of key-focus heads by intervention: does the answer hang on what those heads read?

The paper (arXiv 2602.09953, figure 2 e, f) removes steps of high and of low score and sees that only the former cost
accuracy. Removing a step takes it from every head. Here the step stays, and the chosen heads alone are kept from
looking at it from the answer on: where they carry what the answer needs, the answer becomes less likely when the steps
of high score are hidden from them, less so for steps of low score, and less so for as many random heads.

For a hidden set of keys Z the weights of a head in the answer's rows are softmax over the keys outside Z, in float32;
all other heads, rows and layers compute what they always do, from what then reaches them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ...attention import Head, decoder_of
from ...attention.capture import NON_STANDARD_ARGUMENTS
from .bootstrap import interval_ends, problem_numbers, resampled_counts
from .probing import ProbedResponse, answer_logits, chunked_logps, rows_at_once


@dataclass(frozen=True)
class Block:
    """What some heads may not see in one row of a batch.

    Attributes:
        heads: pairs (layer, query head).
        ranges: half-open (start, end) ranges of the keys that are hidden.
        query_start: first query they are hidden from; the ranges end at or before it.
    """

    heads: tuple[Head, ...]
    ranges: tuple[tuple[int, int], ...]
    query_start: int

    def __post_init__(self):
        for start, end in self.ranges:
            if not 0 <= start < end <= self.query_start:
                raise ValueError(
                    f"ranges hold {(start, end)}: each must hold a key and end by query_start={self.query_start}."
                )


@contextmanager
def masked_attention(model: nn.Module, blocks: Sequence[Block | None]) -> Iterator[None]:
    """Hide keys from heads in every forward of `model` inside the context.

    As in `attention.capture`, the registry entry of the model's attention implementation is replaced, and put back on
    exit: the layer computes what it always does, then the rows of the blocked heads are computed once more without the
    hidden keys.

    Args:
        model: a transformers decoder, plain or wrapped, with an attention implementation of `AttentionInterface`.
        blocks: one per row of the batch; None leaves a row alone. The rows must have no padding.

    Raises:
        ValueError: where the attention is not a plain causal softmax of queries and keys, a head does not exist, or
            the batch has another number of rows.
    """
    decoder = decoder_of(model)
    config = decoder.config
    name, registry = config._attn_implementation, AttentionInterface()
    if name not in registry:
        raise ValueError(f"attn_implementation={name!r} cannot be masked; load the model with 'sdpa'.")
    for layer, head in {head for block in blocks if block for head in block.heads}:
        if layer >= config.num_hidden_layers or head >= config.num_attention_heads:
            raise ValueError(
                f"heads hold {(layer, head)}: the model has {config.num_hidden_layers} layers of "
                f"{config.num_attention_heads} heads."
            )
    attention = registry[name]
    modules = frozenset(id(module) for module in decoder.modules())

    def masked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        output, weights = attention(module, query, key, value, *args, **kwargs)
        layer = getattr(module, "layer_idx", None)
        if id(module) not in modules or not any(layer == one for b in blocks if b for one, _ in b.heads):
            return output, weights
        _check(module, query, key, len(blocks), kwargs)
        output = output.clone()  # (B, T, H, D)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
        for row, block in enumerate(blocks):
            heads = [head for one, head in block.heads if one == layer] if block else []
            if heads:
                rows = _masked_rows(query[row], key[row], value[row], heads, block, scaling, window)
                output[row][block.query_start :, heads] = rows.transpose(0, 1).to(output)
        return output, weights

    AttentionInterface.register(name, masked)
    try:
        yield
    finally:
        AttentionInterface.register(name, attention)


def _check(module: nn.Module, query: Tensor, key: Tensor, num_blocks: int, kwargs: dict) -> None:
    odd = [name for name in NON_STANDARD_ARGUMENTS if kwargs.get(name) is not None]
    if odd or kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(
            f"model: the attention of {type(module).__name__} is not a causal softmax of queries and keys alone "
            f"({', '.join(odd) or 'is_causal=False'}); use one that is (Qwen2, Qwen3, Llama, ...)."
        )
    if query.shape[0] != num_blocks or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"blocks={num_blocks} rows, but the forward has {query.shape[0]} rows of {query.shape[2]} queries and "
            f"{key.shape[2]} keys; give one block per row, and use_cache=False."
        )


def _masked_rows(
    query: Tensor, key: Tensor, value: Tensor, heads: list[int], block: Block, scaling: float, window: int | None
) -> Tensor:
    """(heads, rows, D) float32 outputs of the rows from `query_start` on.

    query: (H, T, D), key and value: (Hkv, T, D).
    """
    shared = query.shape[0] // key.shape[0]
    owners = [head // shared for head in heads]
    total = query.shape[1]
    keys = torch.arange(total, device=query.device)
    rows = keys[block.query_start :, None]  # (F, 1)
    visible = keys <= rows  # (F, T)
    if window:
        visible &= keys > rows - window
    for start, end in block.ranges:
        visible[:, start:end] = False
    logits = query[heads, block.query_start :].float() @ key[owners].float().transpose(1, 2) * scaling
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ value[owners].float()


# The check -----------------------------------------------------------------------------------------------------------


CONDITIONS = ("chosen, high", "chosen, low", "random, high", "random, low")


@dataclass
class InterventionReport:
    """What hiding steps from heads does to the answer.

    Conditions name the heads (the chosen ones, or as many random others) and the steps that are hidden from them: the
    share of the steps with the highest, or the lowest, score of the chosen heads.

    Attributes:
        num_responses: responses probed.
        num_problems: their problems.
        drops: per condition mean and bootstrap interval (95 %, over problems) of the loss of log-likelihood, in nats
            per answer token.
        changed: per condition the share of answer tokens at which another token becomes the most likely.
        contrast: mean and interval of (chosen high - chosen low) - (random high - random low), in nats per token.
            Heads that carry what the answer needs have it above 0.
    """

    num_responses: int
    num_problems: int
    drops: dict[str, list[float]]
    changed: dict[str, float]
    contrast: list[float]


def check_by_intervention(
    model: PreTrainedModel,
    responses: Sequence[ProbedResponse],
    chosen: Sequence[Head],
    generator: torch.Generator,
    *,
    share: float = 0.25,
    num_random: int = 3,
    batch_size: int = 8,
) -> InterventionReport | None:
    """Hide steps of high and of low score from the chosen heads and from random ones, and read what the answer loses.

    Args:
        model: the model, in evaluation mode.
        responses: those with fewer than two steps are left out.
        chosen: the heads, (layer, head).
        generator: source of the random heads and of the bootstrap.
        share: share of a response's steps that is hidden at once, rounded up and at most half.
        num_random: draws of random heads per response; their effects are averaged.
        batch_size: rows per forward.

    Returns:
        None if no response has two steps, or there are not enough other heads.
    """
    num_heads = decoder_of(model).config.num_attention_heads
    flat = [layer * num_heads + head for layer, head in chosen]
    usable = [one for one in responses if len(one.step_ranges) > 1]
    others = [index for index in range(usable[0].scores.shape[0] if usable else 0) if index not in flat]
    if len(others) < len(flat):
        return None
    drops, changes = [], []
    for one in usable:
        order = one.scores[flat].double().mean(0).argsort(stable=True).tolist()
        count = min(math.ceil(share * len(order)), len(order) // 2)
        draws = [torch.randperm(len(others), generator=generator)[: len(flat)].tolist() for _ in range(num_random)]
        blocks: list[Block | None] = [None]
        for heads in [flat, *[[others[place] for place in draw] for draw in draws]]:
            pairs = tuple(divmod(index, num_heads) for index in heads)
            for steps in (order[-count:], order[:count]):
                ranges = tuple(one.step_ranges[step] for step in steps)
                blocks.append(Block(pairs, ranges, len(one.prompt_ids) + one.answer_start))
        loss, changed = _effects(model, one, blocks, batch_size)  # (1 + draws, 2)
        drops.append([*loss[0], *loss[1:].mean(0)])
        changes.append([*changed[0], *changed[1:].mean(0)])
    problems = [one.response.problem for one in usable]
    return _summary(torch.tensor(drops, dtype=torch.float64), torch.tensor(changes), problems, generator)


def _effects(model: PreTrainedModel, response: ProbedResponse, blocks: Sequence[Block | None], batch_size: int):
    """Loss of log p per answer token and share of other most likely tokens, (sets of heads, 2) each.

    Blocks: none first, then high and low of each set of heads.
    """
    device = next(model.parameters()).device
    length = len(response.response.completion_ids) - response.answer_start
    ids = torch.tensor([response.ids], device=device)
    rows = rows_at_once(model, length, batch_size)
    logps, best = [], []
    for start in range(0, len(blocks), rows):
        batch = blocks[start : start + rows]
        repeated = ids.repeat(len(batch), 1)  # (B, L)
        with masked_attention(model, batch):
            logits = answer_logits(model, repeated, torch.ones_like(repeated), length)
        logps.append(chunked_logps(logits, repeated[:, -length:]).double().mean(1))
        best.append(logits.argmax(-1))
    logps, best = torch.cat(logps).cpu(), torch.cat(best).cpu()
    changed = (best[1:] != best[0]).double().mean(1)
    return (logps[0] - logps[1:]).view(-1, 2), changed.view(-1, 2)


def _summary(drops: Tensor, changes: Tensor, problems: list[str], generator: torch.Generator) -> InterventionReport:
    """drops, changes: (R, 4) in the order of `CONDITIONS`."""
    values = torch.cat([drops, drops @ torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], dtype=torch.float64)], dim=1)
    numbers = problem_numbers(problems)
    counts = resampled_counts(numbers, 1000, generator)
    lower, upper = interval_ends(counts @ values / counts.sum(1, keepdim=True))
    rows = torch.stack([values.mean(0), lower, upper], dim=1).tolist()
    return InterventionReport(
        num_responses=len(problems),
        num_problems=int(numbers.max()) + 1,
        drops=dict(zip(CONDITIONS, rows[:4], strict=True)),
        changed=dict(zip(CONDITIONS, changes.mean(0).tolist(), strict=True)),
        contrast=rows[4],
    )
