"""The attention function that makes a packed row exact, under the name of the model's own.

A model's forward hands its keyword arguments on to the attention function that transformers' `AttentionInterface`
holds under the model's name (sdpa, flash_attention_2, ...). A packed forward passes its tree there: the entry, while
packed rows live, is a function that reads the tree, and without one calls what it replaced with the same arguments. So
other forwards are the same to the bit, and a layer that gradient checkpointing runs again in the backward finds its
tree among its arguments.
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils.generic import is_flash_attention_requested

from .kernels import blocked_attention, gathered_paths, merged_attention, path_mask, varlen_attention, varlen_is_exact
from .layout import PrefixTree


TREE_ARGUMENT = "prefix_tree"
"""Keyword by which a model's forward hands the tree to its attention function."""

REFUSED_ARGUMENTS = ("softcap", "s_aux", "position_bias")
"""Arguments by which an architecture changes its logits or its softmax."""


def read_trees(name: str, owner: object) -> None:
    """Let the attention function registered as `name` read packed rows for as long as `owner` lives.

    The owner is the tree itself, which the graph holds where a backward runs layers again. Entries that are put over
    this one meanwhile (an observer's) are left alone.
    """
    registry = AttentionInterface._global_mapping
    entry = registry.get(name)
    if not isinstance(entry, _TreeReader):
        entry = _TreeReader(name, entry)
        AttentionInterface.register(name, entry)
    entry.owners += 1
    weakref.finalize(owner, entry.release).atexit = False


class _TreeReader:
    """An entry of `AttentionInterface`: packed rows by their tree, all else by the entry it replaced."""

    def __init__(self, name: str, replaced: Callable | None):
        self.name = name
        self.replaced = replaced
        self.owners = 0

    def release(self) -> None:
        registry = AttentionInterface._global_mapping
        self.owners -= 1
        if self.owners or registry.get(self.name) is not self:
            return
        if self.replaced is None:
            del registry[self.name]
        else:
            registry[self.name] = self.replaced

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        prefix_tree: PrefixTree | None = None,
        **kwargs: Any,
    ):
        attention = self.replaced or _eager_attention(module)
        if prefix_tree is None:
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        return _attend(self.name, attention, module, query, key, value, prefix_tree, kwargs)


def _attend(
    name: str,
    attention: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: PrefixTree,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """A packed row's attention, by the model's own kernels where they can, else by torch's."""
    _check(module, query, key, tree, kwargs)
    tree.readers += 1
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if is_flash_attention_requested(requested_attention_implementation=name):
        paths = gathered_paths(tree, query.device)
        edges = dict(zip(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), paths[1:], strict=True))
        key, value = key.index_select(2, paths.index), value.index_select(2, paths.index)
        return attention(module, query, key, value, None, **kwargs, **edges)
    if window is not None and window >= tree.longest_path:
        window = None  # it reaches everywhere
    if name == "flex_attention":
        return attention(module, query, key, value, path_mask(tree, window, query.device), **kwargs)
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query, key, value = _as_autocast(query, key, value)
    if query.device.type == "cpu" and window is None and query.shape[-1] == value.shape[-1]:
        return merged_attention(query, key, value, scaling, tree), None
    if varlen_is_exact(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1]):
        return varlen_attention(query, key, value, scaling, tree, window), None
    return blocked_attention(query, key, value, scaling, tree, window), None


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of the operands of torch's scaled_dot_product_attention, for kernels it does not know."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [tensor.to(dtype) for tensor in tensors]


def _check(module: nn.Module, query: Tensor, key: Tensor, tree: PrefixTree, kwargs: dict[str, Any]) -> None:
    odd = [name for name in REFUSED_ARGUMENTS if kwargs.get(name) is not None]
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        odd.append("is_causal=False")
    if kwargs.get("dropout"):
        odd.append("dropout")
    if odd:
        raise ValueError(
            f"model: the attention of {type(module).__name__} uses {', '.join(odd)}, so a packed row's would not be "
            "that of its rows; forward them as rows."
        )
    if not query.shape[0] == 1 or not query.shape[2] == key.shape[2] == tree.num_tokens:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: a packed row of {tree.num_tokens} tokens needs a "
            "batch of one, use_cache=False and no prefix tuning."
        )


def _eager_attention(module: nn.Module) -> Callable:
    """The function that `AttentionInterface` falls back to for "eager": that of the modeling file."""
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
