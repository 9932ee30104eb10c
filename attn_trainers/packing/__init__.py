"""Rows that share prefixes, forwarded once: exact log-probs and gradients at the price of the unique tokens."""

from collections.abc import Sequence

from torch import Tensor, nn

from .ability import can_pack
from .forward import packed_forward, token_log_probs
from .layout import PackedRows, PrefixTree, pack_rows, unique_tokens
from .observing import RowsObserver


__all__ = [
    "PackedRows",
    "PrefixTree",
    "RowsObserver",
    "can_pack",
    "pack_rows",
    "packed_forward",
    "packed_logps",
    "token_log_probs",
    "unique_tokens",
]


def packed_logps(
    model: nn.Module,
    input_ids: Sequence[Sequence[int]],
    completion_starts: Sequence[int],
    *,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probs of rows that may share prefixes, each shared token forwarded once.

    The numbers are those of the rows one by one: float32 values and parameter gradients to rounding (the published
    trees, AttnRL, arXiv 2509.26628: one rollout and its branches).

    Args:
        model: transformers decoder, plain or wrapped.
        input_ids: token ids of each row, prompt and completion, without padding.
        completion_starts: per row, index of its first completion token, from 1 to the row's length.
        temperature: divides the logits.

    Returns:
        Per row (len(row) - completion_start,) log-probs of its completion tokens, float32, differentiable.

    Raises:
        ValueError: for empty rows, starts out of range, or a model that cannot be packed (`can_pack`).
    """
    if not len(input_ids):
        return []
    reason = can_pack(model)
    if reason:
        raise ValueError(f"model={type(model).__name__} cannot be packed: {reason}. Forward its rows one by one.")
    return packed_forward(model, pack_rows(input_ids, completion_starts), temperature=temperature)[0]
