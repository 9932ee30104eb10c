"""Attention heads that start out as look-ups: a small model need not spend its warm start on finding induction.

The circuit is the known one of induction heads: in the first layer head h copies the token that stands h + 1 back into
a subspace of its own; in the second, heads match what stands at and before the query with what stands before a key,
and copy the key's token. Everything is a starting value and is trained on.
"""

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM


ROPE_THETA = 1e8  # the slower half of the frequencies turns by less than a radian over a solution: content can match
WIDTH, HEAD_SIZE = 128, 32
TOKEN_SIZE = 64  # leading dimensions of the stream that hold the token itself
CODE_SIZE = 20  # dimensions of a copied token: as many as a head has at slow frequencies
SHARPNESS = 7.0

# What each head of the second layer matches: tokens back from the query, tokens back from the key.
MATCHES = ((0, 1), (0, 1), (2, 2), (3, 3))


def wire_lookups(model: Qwen2ForCausalLM) -> None:
    """Give the first two layers of a fresh model their starting values.

    The model is 128 wide with as many key heads as query heads, of 32, and `ROPE_THETA`.
    """
    half = HEAD_SIZE // 2
    slow = torch.cat([torch.arange(half - CODE_SIZE // 2, half), torch.arange(HEAD_SIZE - CODE_SIZE // 2, HEAD_SIZE)])
    code = torch.nn.init.orthogonal_(torch.empty(CODE_SIZE, TOKEN_SIZE))
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, TOKEN_SIZE:] = 0.0
        embeddings[:, :TOKEN_SIZE] = torch.nn.functional.normalize(torch.randn(len(embeddings), TOKEN_SIZE), dim=1)
        for back in (1, 2, 3):
            rows = _rows(back - 1)
            _look_back(first, rows, back)
            _set(first.v_proj.weight, rows.start + torch.arange(CODE_SIZE), slice(0, TOKEN_SIZE), code)
            first.o_proj.weight[:, rows] = 0.0
            written = torch.eye(CODE_SIZE) * 0.12
            _set(first.o_proj.weight, _code_columns(back), slice(rows.start, rows.start + CODE_SIZE), written)
        for head, (of_query, of_key) in enumerate(MATCHES):
            rows = _rows(head)
            for projection, back in ((second.q_proj, of_query), (second.k_proj, of_key)):
                projection.weight[rows] = 0.0
                reads = code if back == 0 else torch.eye(CODE_SIZE)
                columns = slice(0, TOKEN_SIZE) if back == 0 else _code_columns(back)
                _set(projection.weight, rows.start + slow, columns, (4.0 if back == 0 else 2.5) * reads)
            part = slice(HEAD_SIZE * (head % 2), HEAD_SIZE * (head % 2 + 1))
            second.v_proj.weight[rows] = 0.0
            _set(second.v_proj.weight, torch.arange(rows.start, rows.stop), part, torch.eye(HEAD_SIZE))
            second.o_proj.weight[:, rows] = 0.0
            rows_out = torch.arange(part.start, part.stop)
            _set(second.o_proj.weight, rows_out, rows, torch.eye(HEAD_SIZE) * 0.5)


def _rows(head: int) -> slice:
    return slice(HEAD_SIZE * head, HEAD_SIZE * (head + 1))


def _code_columns(back: int) -> slice:
    start = TOKEN_SIZE + CODE_SIZE * (back - 1)
    return slice(start, start + CODE_SIZE)


def _set(weight: Tensor, rows: Tensor | slice, columns: slice, values: Tensor) -> None:
    weight[rows, columns] = values


def _look_back(attention: torch.nn.Module, rows: slice, back: int) -> None:
    """Let a head attend `back` tokens back: constant queries and keys that rotary positions turn into a peak there."""
    half = HEAD_SIZE // 2
    fast = torch.arange(3)
    angles = back * ROPE_THETA ** (-fast / half)
    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0
    query, key = torch.zeros(HEAD_SIZE), torch.zeros(HEAD_SIZE)
    query[fast] = SHARPNESS
    key[fast], key[half + fast] = SHARPNESS * angles.cos(), SHARPNESS * angles.sin()
    attention.q_proj.bias[rows], attention.k_proj.bias[rows] = query, key
