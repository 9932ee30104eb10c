"""Queries and keys of a model's attention layers, read while an ordinary forward runs.

transformers looks its attention function up by name, in `AttentionInterface`, at every layer of every forward. While
a model is observed, the entry under the model's own name (sdpa, eager, flash_attention_2, ...) is a function that
first shows the layer's queries and keys to an observer and then calls the entry it replaced, with the same arguments.
So no modeling file is patched, the masks are the model's own, and its outputs are the same to the bit. The name in the
model's config is left alone on purpose: masks, flash attention's unpadding and its kernels are chosen by that name.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, PreTrainedModel


# Layer types (transformers' `config.layer_types`) whose weights are softmax(q k^T · scaling) over earlier tokens.
STANDARD_LAYER_TYPES = ("full_attention", "sliding_attention")
# Arguments by which an architecture changes its logits or its softmax: queries and keys alone do not tell the weights.
NON_STANDARD_ARGUMENTS = ("softcap", "s_aux", "position_bias")


@dataclass
class LayerAttention:
    """What one attention layer computed its weights from, in one forward.

    The weights are softmax(query · keyᵀ · scaling) over the real tokens at or before the query and, with a sliding
    window w, at distances below w only. Query head h reads key head h // (H / Hkv).

    Attributes:
        layer_idx: index of the layer, from 0.
        query: (B, H, T, D), after RoPE and any query norm.
        key: (B, Hkv, T, D), after RoPE and any key norm, heads not repeated.
        scaling: factor of the logits.
        sliding_window: number of tokens a query sees, itself included; None for all.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    scaling: float
    sliding_window: int | None


class AttentionObserver(Protocol):
    """Receives the attention of the layers it asks for, once per layer and forward, layers in order."""

    layers: frozenset[int] | None
    """Layers to observe; None for all."""

    def observe(self, layer: LayerAttention) -> None:
        """Called without gradients and without autocast, with tensors of the type that the model's attention computes
        in; they may be the model's own: read them, keep none."""


@contextmanager
def observe_attention(model: nn.Module, observer: AttentionObserver) -> Iterator[None]:
    """Show the attention layers of every forward of `model` inside the context to `observer`.

    Only the registry entry of the model's attention implementation is replaced and, on exit, put back, also after an
    exception; no parameter and no module is touched, so the forward may be any that a trainer makes (DDP, DeepSpeed,
    FSDP, PEFT, autocast). Meant for forwards without gradients: under gradient checkpointing a backward inside the
    context runs the layers again, and the observer would see them twice.

    Args:
        model: a transformers decoder, plain or wrapped (PEFT, DDP, DeepSpeed engine, FSDP, torch.compile).
        observer: what receives the layers.

    Raises:
        ValueError: where the model's attention does not go through `AttentionInterface`, where a layer asked for does
            not exist or was not seen in a forward, or where its weights are not a plain softmax of queries and keys
            (logit soft-capping, sinks, position biases, chunked attention, a key-value cache).
    """
    decoder = decoder_of(model)
    name = decoder.config._attn_implementation
    needed = _needed_layers(decoder, observer)
    modules = frozenset(id(module) for module in decoder.modules())
    seen: set[int] = set()
    registry = AttentionInterface._global_mapping
    replaced = registry.get(name)

    def observed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        if id(module) in modules and getattr(module, "layer_idx", None) in needed:
            _show(observer, module, query, key, kwargs)
            seen.add(module.layer_idx)
        attention = replaced or _eager_attention(module)
        return attention(module, query, key, value, *args, **kwargs)

    def check_all_seen(*_: Any) -> None:
        missing = sorted(needed - seen)
        seen.clear()
        if missing:
            raise ValueError(
                f"model={type(decoder).__name__}: a forward under observe_attention showed no attention of layers "
                f"{missing}. Those layers do not call transformers' AttentionInterface; use an architecture whose "
                "layers all do (Qwen2, Qwen3, Llama, ...) or ask for other layers."
            )

    AttentionInterface.register(name, observed_attention)
    hook = decoder.register_forward_hook(check_all_seen)
    try:
        yield
    finally:
        hook.remove()
        if replaced is None:
            del registry[name]
        else:
            registry[name] = replaced


@torch.no_grad()
def forward_for_attention(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, observer: AttentionObserver
) -> None:
    """Run `model` for its attention alone: no gradients, no logits, no cache, nothing after the last observed layer.

    Positions count from each sequence's first real token. TRL's forwards let them count from the first column, padding
    included; rotary embeddings depend on distances only, so the attention is the same up to rounding. Dropout stays as
    the model's mode has it. Where parameters are sharded (ZeRO-3, FSDP) the whole model is run, through the wrapper,
    since every rank must gather the same parameters in the same order.

    Args:
        model: as for `observe_attention`.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; right- or left-padded.
        observer: what receives the layers.

    Raises:
        ValueError: as `observe_attention`.
    """
    decoder = decoder_of(model)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0),  # (B, T)
        "use_cache": False,
    }
    with observe_attention(model, observer):
        if _must_run_whole(model, decoder):
            model(**inputs, logits_to_keep=1)
        else:
            with _stop_after(decoder, observer.layers):
                decoder(**inputs)


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder stack (embeddings, layers, final norm) inside a plain or wrapped transformers model.

    Raises:
        ValueError: where there is no transformers model inside, or its attention does not go through
            `AttentionInterface`.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "module"):  # DDP, DeepSpeed engine, FSDP
            inner = inner.module
        else:
            raise ValueError(f"model={type(model).__name__} holds no transformers model; pass a PreTrainedModel.")
    decoder = inner.get_decoder()
    if not type(decoder)._can_set_attn_implementation():
        raise ValueError(
            f"model={type(inner).__name__}: its attention does not go through transformers' AttentionInterface, so "
            "its queries and keys cannot be read; use an architecture that does (Qwen2, Qwen3, Llama, ...)."
        )
    return decoder


def _needed_layers(decoder: PreTrainedModel, observer: AttentionObserver) -> frozenset[int]:
    config = decoder.config
    types = getattr(config, "layer_types", None) or [STANDARD_LAYER_TYPES[0]] * config.num_hidden_layers
    layers = frozenset(range(config.num_hidden_layers) if observer.layers is None else observer.layers)
    outside = sorted(layer for layer in layers if not 0 <= layer < config.num_hidden_layers)
    if outside:
        raise ValueError(f"layers={outside}: {type(decoder).__name__} has layers 0 to {config.num_hidden_layers - 1}.")
    odd = sorted(layer for layer in layers if types[layer] not in STANDARD_LAYER_TYPES)
    if odd:
        raise ValueError(
            f"layers={odd} of {type(decoder).__name__} are {sorted({types[layer] for layer in odd})} layers, whose "
            f"weights are no plain softmax; observe {' and '.join(STANDARD_LAYER_TYPES)} layers only."
        )
    return layers


def _show(observer: AttentionObserver, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    odd = [name for name in NON_STANDARD_ARGUMENTS if kwargs.get(name) is not None]
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        odd.append("is_causal=False")
    if odd:
        raise ValueError(
            f"model: the attention of {type(module).__name__} uses {', '.join(odd)}, so its weights are not a causal "
            "softmax of queries and keys alone; use one with standard attention (Qwen2, Qwen3, Llama, ...)."
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key length={key.shape[2]}, query length={query.shape[2]}: observe whole sequences, with use_cache=False "
            "and without prefix tuning."
        )
    scaling = kwargs.get("scaling")
    sliding_window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    dtype = _computed_in(query)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        observer.observe(
            LayerAttention(
                layer_idx=module.layer_idx,
                query=query.detach().to(dtype),
                key=key.detach().to(dtype),
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                sliding_window=sliding_window,
            )
        )


def _computed_in(query: Tensor) -> torch.dtype:
    """Type that the model's own attention computes in: under autocast that of the autocast, whatever rotary
    embeddings, which are float32 where the weights are, made of the queries."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _eager_attention(module: nn.Module) -> Callable:
    """What `AttentionInterface.get_interface` falls back to for "eager": a function of the modeling file."""
    for cls in type(module).__mro__:
        attention = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if attention is not None:
            return attention
    raise ValueError(f"model: no eager attention function beside {type(module).__name__}; load the model with sdpa.")


@contextmanager
def _stop_after(decoder: PreTrainedModel, layers: frozenset[int] | None) -> Iterator[None]:
    """Let `decoder` stop after the last of `layers`: decoders run `self.layers[: config.num_hidden_layers]`."""
    whole = decoder.config.num_hidden_layers
    if layers:
        decoder.config.num_hidden_layers = max(layers) + 1
    try:
        yield
    finally:
        decoder.config.num_hidden_layers = whole


def _must_run_whole(model: nn.Module, decoder: PreTrainedModel) -> bool:
    """Whether parameters are sharded, or tokens are added in front of the decoder (PEFT prompt learning)."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return True
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in decoder.parameters())
