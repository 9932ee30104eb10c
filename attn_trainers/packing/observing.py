"""Observers of attention that know rows, shown a packed row."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import PackedRows


class RowsObserver:
    """Shows an attention observer the rows of a packed forward as the padded batch that it expects.

    Weights are softmax(query · key) over a row's own tokens, and a packed row holds each token's query and key as the
    row's own forward would: gathering them is all there is to do.

    Args:
        observer: what receives the layers, an `AttentionObserver`.
        packed: the packed rows.
        attention_mask: (B, T), 1 for real tokens, of the padded batch of these rows, in their order.
    """

    def __init__(self, observer: Any, packed: PackedRows, attention_mask: Tensor):
        mask = attention_mask.bool()
        if mask.sum(dim=1).tolist() != [len(where) for where in packed.positions]:
            raise ValueError(
                f"attention_mask has {mask.sum(dim=1).tolist()} tokens per row, the packed rows "
                f"{[len(where) for where in packed.positions]}; pass the mask of the same rows."
            )
        self.observer = observer
        self.layers = observer.layers
        self._index = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)  # (B, T)
        self._index[mask] = torch.from_numpy(np.concatenate(packed.positions)).to(mask.device)

    def observe(self, layer: Any) -> None:
        """Called with the packed row's queries (1, H, N, D) and keys, hands on (B, H, T, D)."""
        query, key = (tensor[0][:, self._index].transpose(0, 1) for tensor in (layer.query, layer.key))
        self.observer.observe(replace(layer, query=query, key=key))
