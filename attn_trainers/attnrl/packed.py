"""Forwards of trees in which each shared prefix is computed once, in place of one forward per row."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..attention import AttentionObserver
from ..base.forwards import observed
from ..packing import PackedRows, RowsObserver, can_pack, pack_rows, packed_forward, unique_tokens


logger = logging.getLogger(__name__)

# Rows that share less than this part of their tokens are forwarded as they are.
LEAST_SHARED = 0.02


class PackingMixin:
    """
    Log-probs of rows that share prefixes from one packed row, for a `GRPOTrainer` subclass (named before it in the
    bases): those of the loss with their gradients, the old ones and the reference model's. TRL's loss sees (B, T).

    `args.pack_trees` says whether: "auto" where the model allows it, "on" (refused where it does not), "off".
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        reason = can_pack(self.model) if self.args.pack_trees != "off" else "pack_trees='off'"
        if reason and self.args.pack_trees == "on":
            raise ValueError(f"pack_trees='on' does not go with this model: {reason}; set it to 'auto' or 'off'.")
        if reason and self.args.pack_trees == "auto":
            logger.info("Rows of trees are forwarded one by one: %s.", reason)
        self.packs_trees = reason is None
        self._row_observer: AttentionObserver | None = None

    @contextmanager
    def observing(self, observer: AttentionObserver | None) -> Iterator[None]:
        """Context in which an observer sees the rows of forwards, packed or not."""
        self._row_observer = observer
        try:
            yield
        finally:
            self._row_observer = None

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **kwargs,
    ):
        size = batch_size or input_ids.size(0)
        text_only = not compute_aux_loss and all(value is None for value in kwargs.values())
        parent = super()._get_per_token_logps_and_entropies
        logps, entropies, aux_losses = [], [], []
        for start in range(0, input_ids.size(0), size):
            ids, mask = input_ids[start : start + size], attention_mask[start : start + size]
            packed = self._pack(ids, mask, logits_to_keep) if text_only else None
            if packed is None:
                with observed(self.model, self._row_observer):
                    one = parent(model, ids, mask, logits_to_keep, None, compute_entropy, compute_aux_loss, **kwargs)
            else:
                one = (*self._forward_packed(model, packed, mask, logits_to_keep, compute_entropy), None)
            logps.append(one[0])
            entropies.append(one[1])
            aux_losses.append(one[2])
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _pack(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> PackedRows | None:
        """The rows of a micro-batch as one, `None` where they are to be forwarded as they are.

        A row whose completion is masked out keeps its first token, so that the loss has a graph on every rank.
        """
        if not self.packs_trees:
            return None
        mask = attention_mask.bool().clone()  # (B, P+T)
        mask[:, -width] = True
        rows = [ids[real].tolist() for ids, real in zip(input_ids.cpu(), mask.cpu(), strict=True)]
        if unique_tokens(rows) > (1.0 - LEAST_SHARED) * sum(map(len, rows)):
            return None
        return pack_rows(rows, mask[:, :-width].sum(dim=1).tolist())

    def _forward_packed(
        self, model, packed: PackedRows, attention_mask: Tensor, width: int, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T) log-probs, and entropies where they are wanted; 0 behind the end of a row."""
        observer = self._row_observer
        if observer is not None:
            mask = attention_mask.clone()
            mask[:, -width] = 1
            observer = RowsObserver(observer, packed, mask)
        with self.accelerator.autocast():
            logps, entropies = packed_forward(
                model,
                packed,
                entropies=compute_entropy,
                fused_head=True,
                around=observed(self.model, observer),
                device=self.accelerator.device,
            )
        return pad_completions(logps, width), pad_completions(entropies, width) if compute_entropy else None


def pad_completions(rows: list[Tensor], width: int) -> Tensor:
    """(B, width) from rows of (n_i,), 0 behind their ends."""
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
