"""Which models can forward packed rows."""

import inspect

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask
from transformers.utils.generic import is_flash_attention_requested


PACKED_LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layer types (transformers' `config.layer_types`) whose weights are softmax(q k^T · scaling) over earlier tokens."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a plain or wrapped one (PEFT, DDP, DeepSpeed engine, FSDP, torch.compile).

    Raises:
        ValueError: where there is none.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"model={type(model).__name__} holds no transformers model; pass a PreTrainedModel.")
    return inner


def can_pack(model: nn.Module) -> str | None:
    """Why a model's rows cannot be forwarded as one packed row; None where they can.

    A reason is a clause that ends a sentence like "rows are forwarded one by one: ...".
    """
    try:
        inner = language_model(model)
    except ValueError as error:
        return str(error)
    checks = (_wrapper, _architecture, _attention, _implementation)
    return next((reason for check in checks if (reason := check(model, inner))), None)


def _wrapper(model: nn.Module, inner: PreTrainedModel) -> str | None:
    for module in model.modules():
        if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
            return "prompt learning (PEFT) puts tokens of its own before every row"
        if module is inner:
            break
    return None


def _architecture(model: nn.Module, inner: PreTrainedModel) -> str | None:
    name, config = type(inner).__name__, inner.config
    if config.get_text_config() is not config:
        return f"{name} is multimodal"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder"
    if not inner._supports_attention_backend:
        return f"{name} does not hand keyword arguments on to transformers' AttentionInterface"
    if inner._is_stateful:
        return f"{name} keeps a recurrent state"
    parameters = inspect.signature(type(inner).forward).parameters
    for argument in ("position_ids", "logits_to_keep"):
        if argument not in parameters:
            return f"{name} takes no {argument}"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits=True: its load-balancing loss would count a shared token once"
    return None


def _attention(model: nn.Module, inner: PreTrainedModel) -> str | None:
    name, config = type(inner).__name__, inner.config
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - set(PACKED_LAYER_TYPES))
    if odd:
        return f"{name} has {', '.join(odd)} layers"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention logits (attn_logit_softcapping)"
    for dropout in ("attention_dropout", "attn_pdrop"):
        if getattr(config, dropout, None):
            return f"{dropout}={getattr(config, dropout)} drops the weights of each row anew"
    for module in inner.modules():
        if hasattr(module, "sinks"):
            return f"{name} has attention sinks"
        if getattr(module, "is_causal", True) is False:
            return f"{type(module).__name__} is not causal"
    return None


def _implementation(model: nn.Module, inner: PreTrainedModel) -> str | None:
    name = inner.config._attn_implementation
    if is_flash_attention_requested(requested_attention_implementation=name):
        if flash_attn_supports_top_left_mask():
            return f"attn_implementation={name} aligns causal masks to the first key; use FlashAttention 2.1 or later"
        return None if name in AttentionInterface._global_mapping else f"attn_implementation={name} is not registered"
    if name not in ("sdpa", "eager", "flex_attention"):
        return f'attn_implementation={name} is unknown to packing; use "sdpa"'
    return None
