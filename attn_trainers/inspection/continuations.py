"""Greedy continuations of a response after a forced token: the part of the perturbation check that runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..attention.heads import jaccard
from .perturbation import Perturbation, PerturbedResponse, choose_positions, content_words


@dataclass(frozen=True)
class PerturbationSettings:
    """How a response is perturbed (the paper gives none of it).

    Attributes:
        positions: in the top and in the bottom set.
        candidates: tokens forced at each position.
        max_tokens: of a continuation at most; the response's own suffix is cut likewise.
        batch_size: continuations generated together.
    """

    positions: int = 5
    candidates: int = 3
    max_tokens: int = 512
    batch_size: int = 16


@torch.no_grad()
def likeliest_others(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    positions: Sequence[int],
    count: int,
    excluded: Sequence[int] = (),
) -> list[list[int]]:
    """The likeliest tokens at positions of a response other than its own, likeliest first.

    Args:
        model: transformers decoder.
        prompt_ids, completion_ids: tokens without padding, at least one each.
        positions: in the completion.
        count: tokens per position.
        excluded: tokens that are never chosen.
    """
    device = model.device
    ids = torch.tensor([[*prompt_ids, *completion_ids[: max(positions)]]], device=device)  # (1, N)
    rows = torch.tensor([len(prompt_ids) + p - 1 for p in positions], device=device)  # they predict the positions
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0].float()  # (positions, V)
    own = torch.tensor([completion_ids[p] for p in positions], device=device)
    logits.scatter_(1, own[:, None], -torch.inf)
    logits[:, list(excluded)] = -torch.inf
    return logits.topk(count, dim=-1).indices.tolist()


def continue_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[list[int]],
    limits: Sequence[int],
    ends: Sequence[int],
    batch_size: int,
) -> list[list[int]]:
    """The likeliest next tokens after each prefix, one after the other, without the end token.

    Args:
        model: transformers decoder. Penalties of its own generation config are not applied.
        tokenizer: of the model, with a padding token.
        prefixes: tokens without padding.
        limits: tokens after each prefix at most, from 1.
        ends: tokens that end a text.
        batch_size: prefixes continued together; those of like length, since the others wait for the longest.
    """
    order = sorted(range(len(prefixes)), key=lambda i: (len(prefixes[i]), i))
    continued: list[list[int]] = [[]] * len(prefixes)
    model_config = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id
    )
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [prefixes[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max(limits[i] for i in chosen),
            )
            width = batch["input_ids"].shape[1]
            for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
                end = next((t for t, token in enumerate(row) if token in ends), len(row))
                continued[i] = row[: min(end, limits[i])]
    finally:
        model.generation_config = model_config
    return continued


def continuations_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    completion_ids: list[int],
    forced: Sequence[tuple[int, list[int]]],
    settings: PerturbationSettings,
    ends: Sequence[int],
    cut_off: bool,
) -> list[list[str]]:
    """Texts behind each token that is forced at each position, special tokens left out.

    Args:
        forced: positions in the completion, each with its tokens.
        cut_off: whether a continuation may be no longer than what the completion has left.
    """
    prefixes, limits = [], []
    for position, tokens in forced:
        left = len(completion_ids) - 1 - position
        for token in tokens:
            prefixes.append([*prompt_ids, *completion_ids[:position], token])
            limits.append(min(settings.max_tokens, left) if cut_off else settings.max_tokens)
    continued = continue_greedily(model, tokenizer, prefixes, limits, ends, settings.batch_size)
    texts = iter(tokenizer.batch_decode(continued, skip_special_tokens=True))
    return [[next(texts) for _ in tokens] for _, tokens in forced]


def perturb_response(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    completion_ids: list[int],
    fai: Tensor,
    settings: PerturbationSettings,
    ends: Sequence[int],
    *,
    cut_off: bool = False,
) -> PerturbedResponse:
    """Force other tokens at the positions of highest and lowest FAI and compare what follows.

    A position is eligible where a content word follows it. A token that ends the text is never forced: nothing would
    follow. Where a token limit cut the response off, its continuations may be as long as its own suffix and no longer,
    so that both have room for as many words.

    Args:
        model: transformers decoder.
        tokenizer: of the model.
        prompt_ids, completion_ids: tokens without padding, at least one each.
        fai: (n,) of the completion, NaN where undefined.
        settings: how many of what.
        ends: tokens that end a text.
        cut_off: whether a token limit ended the response.
    """

    def words_after(position: int) -> set[str]:
        suffix = completion_ids[position + 1 : position + 1 + settings.max_tokens]
        return content_words(tokenizer.decode(suffix, skip_special_tokens=True))

    def text_of(token: int) -> str:
        return tokenizer.decode([token], clean_up_tokenization_spaces=False)

    count = len(completion_ids)
    last = next((p for p in range(count - 1, -1, -1) if words_after(p)), -1)
    top, bottom = choose_positions(fai, torch.arange(count) <= last, settings.positions)
    positions = top + bottom
    if not positions:
        return PerturbedResponse(count, [])
    candidates = likeliest_others(model, prompt_ids, completion_ids, positions, settings.candidates, ends)
    forced = list(zip(positions, candidates, strict=True))
    continued = continuations_of(model, tokenizer, prompt_ids, completion_ids, forced, settings, ends, cut_off)
    perturbations = [
        Perturbation(
            position=position,
            top=index < len(top),
            fai=fai[position].item(),
            token=text_of(completion_ids[position]),
            forced=[text_of(token) for token in tokens],
            jaccards=[jaccard(words_after(position), content_words(text)) for text in texts],
        )
        for index, ((position, tokens), texts) in enumerate(zip(forced, continued, strict=True))
    ]
    return PerturbedResponse(count, perturbations)
