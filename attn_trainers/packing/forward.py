"""Log-probs and entropies of packed rows, by one call of the model as a whole."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .ability import language_model
from .attention import TREE_ARGUMENT, read_trees
from .layout import PackedRows


LOGITS_BUDGET = 2**24
"""Logits that are normalised at once: 64 MiB of float32."""


def packed_forward(
    model: nn.Module,
    packed: PackedRows,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    fused_head: bool = False,
    around: AbstractContextManager | None = None,
    device: torch.device | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Forward packed rows and read every row's completion off them.

    The model is called once, as a whole, with keyword arguments: it may be wrapped by DDP, DeepSpeed, FSDP or PEFT,
    and be under autocast or gradient checkpointing. Every rank of a sharded model calls it alike, one without rows
    with a row of one token. Dropout is the model's own: a shared token is dropped alike in all rows.

    Args:
        model: transformers decoder, plain or wrapped, for which `can_pack` has no reason against it.
        packed: rows from `pack_rows`.
        temperature: divides the logits.
        entropies: whether to compute them too.
        fused_head: call the head that TRL's `add_fused_lm_head` gave the model, with `fused_lm_head=True`; it keeps no
            logits, and its own temperature and outputs hold.
        around: entered around the model's call; an attention observer with a `RowsObserver`, for one.
        device: of the inputs; None for that of the parameters, which is wrong where these are offloaded.

    Returns:
        Per row (C,) log-probs of its completion tokens, float32, differentiable; and as many entropies of the
        distributions that predicted them (nats, at the same temperature), or None.

    Raises:
        ValueError: where a layer went around transformers' `AttentionInterface`, or a kernel cannot be exact.
    """
    config = language_model(model).config
    inputs = _model_inputs(packed, next(model.parameters()).device if device is None else device)
    read_trees(config._attn_implementation, packed.tree)
    readers = packed.tree.readers
    labels = torch.from_numpy(packed.labels).to(inputs["input_ids"].device)  # (N,)
    trained = torch.from_numpy(packed.trained).to(labels.device)  # (M,)
    with around or nullcontext():
        if fused_head:
            output = model(**inputs, shift_labels=labels[None], fused_lm_head=True)
        else:
            output = model(**inputs, logits_to_keep=trained)
    if packed.tree.readers < readers + config.num_hidden_layers:
        raise ValueError(
            f"model={type(model).__name__}: {packed.tree.readers - readers} of {config.num_hidden_layers} layers read "
            "the packed row through transformers' AttentionInterface, so its log-probs are wrong; forward its rows "
            "one by one."
        )
    if fused_head:
        values = [output.log_probs[0, trained], output.entropy[0, trained] if entropies else None]
    else:
        values = token_log_probs(output.logits[0], labels[trained], temperature, entropies)
    logps, entropy = (None if value is None else packed.split(value.float()) for value in values)
    return logps, entropy


def _model_inputs(packed: PackedRows, device: torch.device) -> dict:
    return {
        "input_ids": torch.from_numpy(packed.tokens)[None].to(device),  # (1, N)
        "position_ids": torch.from_numpy(packed.tree.depths)[None].to(device),  # (1, N)
        # A mask of four dimensions is taken as it is, so that none is made from the position ids; one without entries
        # fits no other attention function, should the layout ever meet one.
        "attention_mask": torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device),
        "use_cache": False,
        TREE_ARGUMENT: packed.tree,
    }


def token_log_probs(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, entropies: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of labels, and entropies, in float32; in chunks, which a backward normalises again.

    Args:
        logits: (M, V), before the temperature.
        labels: (M,).
        temperature: divides the logits.
        entropies: whether to compute them too.

    Returns:
        (M,) log-probs, and (M,) entropies in nats or None; differentiable.
    """
    size = max(1, LOGITS_BUDGET // logits.shape[-1])
    chunks = [
        checkpoint(_normalised, some, of, temperature, entropies, use_reentrant=False, preserve_rng_state=False)
        for some, of in zip(logits.split(size), labels.split(size), strict=True)
    ]
    logps, entropy = zip(*chunks, strict=True)
    return torch.cat(logps), torch.cat(entropy) if entropies else None


def _normalised(logits: Tensor, labels: Tensor, temperature: float, entropies: bool) -> tuple[Tensor, Tensor | None]:
    logits = logits.float() / temperature
    norm = logits.logsumexp(dim=-1)
    logps = logits.gather(-1, labels[:, None]).squeeze(-1) - norm
    if not entropies:
        return logps, None
    return logps, norm - ((logits - norm[:, None]).exp() * logits).sum(dim=-1)
