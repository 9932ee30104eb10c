"""Every way to attend over a packed row against softmax under the mask that the rows themselves give."""

import pytest
import torch

from attn_trainers.packing import kernels, pack_rows
from attn_trainers.packing.kernels import blocked_attention, merged_attention, path_mask, varlen_attention


@pytest.fixture
def tree(tree_rows):
    return pack_rows(*tree_rows).tree


@pytest.fixture(params=[(4, 4), (6, 2), (3, 1)], ids="{0[0]} heads, {0[1]} for keys".format)
def operands(request, tree):
    """Query, key, value as a model gives them: heads behind tokens in memory."""
    torch.manual_seed(0)
    heads, key_heads = request.param
    shapes = [(1, tree.num_tokens, count, 8) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, requires_grad=True).transpose(1, 2) for shape in shapes]


def dense(query, key, value, scaling, tree, window=None):
    """Softmax over a path's tokens by a dense mask; (1, N, H, D)."""
    sees = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)  # [query, key]
    for segment, path in enumerate(tree.paths):
        for query_place in range(tree.starts[segment], tree.starts[segment + 1]):
            sees[query_place, path[: tree.depths[query_place] + 1]] = True
    depths = torch.from_numpy(tree.depths)
    if window is not None:
        sees &= depths[:, None] - depths < window
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def assert_same(found, wanted, operands):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.manual_seed(1)
    weights = torch.randn(found.shape)
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), operands),
        torch.autograd.grad((wanted * weights).sum(), operands),
        strict=True,
    )
    for found_grad, wanted_grad in pairs:
        torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-5, atol=1e-5)


def test_merged(operands, tree):
    assert_same(merged_attention(*operands, 0.3, tree), dense(*operands, 0.3, tree), operands)


def test_merged_in_double(operands, tree):
    """The merge itself loses nothing: in double precision both agree far below what float32 could."""
    operands = [tensor.double() for tensor in operands]
    wanted = dense(*operands, 0.3, tree)
    torch.testing.assert_close(merged_attention(*operands, 0.3, tree), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("query_block", [512, 5])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
def test_blocked(operands, tree, window, query_block, monkeypatch):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", query_block)
    wanted = dense(*operands, 0.3, tree, window)
    assert_same(blocked_attention(*operands, 0.3, tree, window), wanted, operands)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen(operands, tree, window, torch_varlen, monkeypatch):
    monkeypatch.setattr(kernels, "varlen_attn", torch_varlen)
    wanted = dense(*operands, 0.3, tree, window)
    assert_same(varlen_attention(*operands, 0.3, tree, window), wanted, operands)


@pytest.mark.parametrize("window", [None, 4])
def test_path_mask(operands, tree, window):
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = (tensor.detach() for tensor in operands)
    mask = path_mask(tree, window, query.device)
    found = flex_attention(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(
        found.transpose(1, 2), dense(query, key, value, 0.3, tree, window), rtol=1e-5, atol=1e-6
    )


@pytest.fixture
def torch_varlen(flash_varlen):
    """`torch.nn.attention.varlen.varlen_attn` in plain torch."""

    def attend(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        assert window_size[1] == 0
        return flash_varlen(query, key, value, cu_q, cu_k, max_q, max_k, scale, window_size=window_size)

    return attend


def test_varlen_is_taken_only_where_it_agrees(torch_varlen, monkeypatch):
    here = (torch.device("cpu"), torch.float32, 4, 2, 8)
    monkeypatch.setattr(kernels, "varlen_attn", torch_varlen)
    assert kernels._varlen_agrees(*here)
    assert not kernels.varlen_is_exact(*here)  # no CUDA, whatever agrees

    def aligned_to_the_first_key(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        parts = []
        key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
        lengths = cu_q.diff().tolist(), cu_k.diff().tolist(), cu_k.diff().tolist()
        for sides in zip(*(t.split(n) for t, n in zip((query, key, value), lengths, strict=True)), strict=True):
            one = [tensor.transpose(0, 1)[None] for tensor in sides]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale)[0])
        return torch.cat(parts, dim=1).transpose(0, 1)

    monkeypatch.setattr(kernels, "varlen_attn", aligned_to_the_first_key)
    assert not kernels._varlen_agrees(*here)

    def absent(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(kernels, "varlen_attn", absent)
    assert not kernels._varlen_agrees(*here)
