"""Attention over a packed row: each token sees the tokens of its path, itself included, and nothing else.

Four ways to the same numbers. None computes a masked half, but for the blocks on a window's edge:

- `merged_attention` (CPU): each segment attends to itself causally; then all its descendants, which lie right behind
  it, attend to it without a mask. The parts of a query are merged by their log-sum-exp. Nothing is gathered.
- `blocked_attention`: torch's scaled_dot_product_attention over the gathered path of each segment, under an additive
  mask; any device and dtype, sliding windows.
- `varlen_attention` (CUDA): one call of FlashAttention over the gathered paths of all segments, its causal mask
  aligned to the end of each path; sliding windows.
- `path_mask`: the rule as a block mask of flex_attention.

Shapes: query (1, H, N, D), key (1, Hkv, N, D), value (1, Hkv, N, D'); results (1, N, H, D'), as attention functions of
transformers return them. Query head h reads key head h // (H / Hkv).
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from .layout import PrefixTree, pack_rows


QUERY_BLOCK = 512
"""Queries handled at once under a mask."""


class Block(NamedTuple):
    """Queries that attend to keys: to all of them, or (`causal`, same tokens) to those up to each query."""

    queries: slice
    keys: slice
    causal: bool


def merged_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, tree: PrefixTree) -> Tensor:
    """The fastest exact way on a CPU, for layers that see the whole path; D and D' must agree."""
    groups = query.shape[1] // key.shape[1]
    out = _MergedAttention.apply(
        query[0].unflatten(0, (-1, groups)),  # (Hkv, G, N, D)
        key.transpose(0, 1),  # (Hkv, 1, N, D)
        value.transpose(0, 1),
        scaling,
        tree.kept("blocks", lambda: _blocks(tree)),
    )
    return out.flatten(0, 1).transpose(0, 1)[None]


def _blocks(tree: PrefixTree) -> list[Block]:
    """All pairs of a token and a token on its path, once each: 2 S blocks at most."""
    edges = zip(tree.starts[:-1], tree.starts[1:], tree.subtree_ends, strict=True)
    own, below = [], []
    for start, end, subtree_end in edges:
        own.append(Block(slice(start, end), slice(start, end), True))
        if subtree_end > end:
            below.append(Block(slice(end, subtree_end), slice(start, end), False))
    return own + below


class _MergedAttention(torch.autograd.Function):
    """Attention as a list of blocks whose first entries hold every query once.

    With lse_b = log sum exp of a query's scores in block b, lse = log sum_b exp(lse_b) over its blocks and out_b what
    the kernel returns for b, out = sum_b exp(lse_b - lse) out_b. The backward of FlashAttention rebuilds weights as
    exp(score - lse) and needs sum(grad · out) per query beside: given the merged lse and out, its gradients of each
    block are those of the whole, and add up.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: list[Block]) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        heads, groups, length, width = query.shape
        # Query heads that share keys lie side by side in a dimension of their own: keys are broadcast, never copied.
        keys, values = key.expand(-1, groups, -1, -1), value.expand(-1, groups, -1, -1)
        exact = {"dtype": torch.promote_types(query.dtype, torch.float32), "device": query.device}
        out = torch.empty(length, heads, groups, width, **exact).permute(1, 2, 0, 3)  # (Hkv, G, N, D)
        lse = torch.empty(length, heads, groups, **exact).permute(1, 2, 0)  # (Hkv, G, N)
        for block in blocks:
            rows = (slice(None), slice(None), block.queries)
            columns = (slice(None), slice(None), block.keys)
            part, part_lse = flash(query[rows], keys[columns], values[columns], 0.0, block.causal, scale=scaling)
            if block.causal:
                out[rows], lse[rows] = part, part_lse
                continue
            merged = torch.logaddexp(lse[rows], part_lse)
            out[rows].mul_((lse[rows] - merged).exp_()[..., None]).addcmul_(
                part.to(out.dtype), (part_lse - merged).exp_()[..., None]
            )
            lse[rows] = merged
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.blocks = scaling, blocks
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, lse = ctx.saved_tensors
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        keys, values = key.expand(-1, query.shape[1], -1, -1), value.expand(-1, query.shape[1], -1, -1)
        exact = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros_like(tensor, dtype=exact) for tensor in (query, key, value)]
        for block in ctx.blocks:
            rows = (slice(None), slice(None), block.queries)
            columns = (slice(None), slice(None), block.keys)
            operands = (grad_out[rows], query[rows], keys[columns], values[columns], out[rows], lse[rows])
            parts = flash_backward(*operands, 0.0, block.causal, scale=ctx.scaling)
            for grad, part, where in zip(grads, parts, (rows, columns, columns), strict=True):
                grad[where].add_(part.sum(dim=1, keepdim=True) if grad.shape[1] < part.shape[1] else part)
        return (*(grad.to(query.dtype) for grad in grads), None, None)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, tree: PrefixTree, window: int | None = None
) -> Tensor:
    """The way that runs anywhere.

    Args:
        query: as the module says, key and value alike.
        key: see query.
        value: see query.
        scaling: factor of the logits.
        tree: the packed row's segments.
        window: tokens a query sees, itself included; None for all.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    parts = []
    for segment, (start, end) in enumerate(zip(tree.starts[:-1], tree.starts[1:], strict=True)):
        path = tree.kept(("path", segment, query.device), lambda s=segment: _to(tree.paths[s], query.device))
        path_key, path_value = key.index_select(2, path), value.index_select(2, path)
        for first in range(start, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            low, high = len(path) - (end - first), len(path) - (end - last)  # depths of the queries
            begin = 0 if window is None else max(0, low - window + 1)
            mask = tree.kept(
                ("mask", low, high, window, query.dtype, query.device),
                lambda edges=(low, high, begin): _band(*edges, window, query),
            )
            parts.append(
                scaled_dot_product_attention(
                    query[:, :, first:last],
                    path_key[:, :, begin:high],
                    path_value[:, :, begin:high],
                    attn_mask=mask,
                    scale=scaling,
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2)


def _band(low: int, high: int, begin: int, window: int | None, like: Tensor) -> Tensor:
    """(high - low, high - begin), 0 where the query at a depth sees the key at a depth, else -inf."""
    query = torch.arange(low, high, device=like.device)[:, None]
    key = torch.arange(begin, high, device=like.device)
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


class Paths(NamedTuple):
    """What varlen kernels of FlashAttention take: queries are segments, keys the gathered paths, laid end to end."""

    index: Tensor  # (K,) packed position of every key
    query_edges: Tensor  # (S + 1,) int32
    key_edges: Tensor  # (S + 1,) int32
    longest_query: int
    longest_key: int


def gathered_paths(tree: PrefixTree, device: torch.device) -> Paths:
    """The paths of all segments on a device, made once per tree."""

    def make() -> Paths:
        edges = np.cumsum([0, *map(len, tree.paths)])
        return Paths(
            _to(np.concatenate(tree.paths), device),
            torch.tensor(tree.starts, dtype=torch.int32, device=device),
            torch.tensor(edges, dtype=torch.int32, device=device),
            tree.longest_segment,
            tree.longest_path,
        )

    return tree.kept(("gathered", device), make)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, tree: PrefixTree, window: int | None = None
) -> Tensor:
    """One call of torch's own FlashAttention; half precision on CUDA. Arguments as `blocked_attention`."""
    paths = gathered_paths(tree, query.device)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, H, D)
    return varlen_attn(
        query,
        key.index_select(0, paths.index),  # whose backward adds where an index's would sort first
        value.index_select(0, paths.index),
        paths.query_edges,
        paths.key_edges,
        paths.longest_query,
        paths.longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )[None]


@cache
def varlen_is_exact(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Whether torch's FlashAttention runs there and does what is needed, seen on one small tree.

    Builds differ in where they align a causal mask whose sides differ, in grouped heads and in the widths they take.
    """
    usual = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return usual and _varlen_agrees(device, dtype, heads, key_heads, width)


def _varlen_agrees(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    tree = pack_rows([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7], [1, 2, 8]], [1, 1, 1]).tree
    shapes = [(1, count, tree.num_tokens, width) for count in (heads, key_heads, key_heads)]
    generator = torch.Generator(device).manual_seed(0)
    with torch.enable_grad():
        inputs = [
            torch.randn(shape, device=device, dtype=dtype, generator=generator, requires_grad=True) for shape in shapes
        ]
        try:
            found = [varlen_attention(*inputs, width**-0.5, tree, window) for window in (None, 2)]
            found += torch.autograd.grad(found[0].sum(), inputs)
        except (RuntimeError, ValueError):
            return False
        wanted = [blocked_attention(*inputs, width**-0.5, tree, window) for window in (None, 2)]
        wanted += torch.autograd.grad(wanted[0].sum(), inputs)
    return all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(found, wanted, strict=True))


def path_mask(tree: PrefixTree, window: int | None, device: torch.device):
    """The rule as a `BlockMask` of flex_attention, made once per tree: a key is seen from its whole subtree."""

    def make():
        ends = _to(np.repeat(tree.subtree_ends, np.diff(tree.starts)), device)  # (N,)
        depths = _to(tree.depths, device)  # (N,)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (query < ends[key])
            return seen if window is None else seen & (depths[query] - depths[key] < window)

        return create_block_mask(sees, None, None, tree.num_tokens, tree.num_tokens, device=device)

    return tree.kept(("flex", window, device), make)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
