"""Observers of the rhythm signals during training: the paper's open points, and the measures of the rhythm reward.

`attn_trainers.attention.RhythmObserver` gives WAAD and FAI of every head. Added here: which row belongs to a token,
what FAI is for the last tokens, and a second look at the chosen global heads for breadth and concentration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention import Horizon, LayerAttention, RhythmObserver, RhythmProfile
from ..attention.heads import HeadSets
from ..attention.pooling import row_weights
from .attention_rows import breadth_and_concentration


def without_last_token(attention_mask: Tensor) -> Tensor:
    """(B, T) mask with each row's last real token taken out."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask.bool(), columns, -1).amax(dim=1, keepdim=True)  # (B, 1)
    return torch.where(columns == last, 0, attention_mask)


class SignalObserver(RhythmObserver):
    """`RhythmObserver` with a choice of the row that belongs to a token and of FAI at the end of the response.

    Args:
        attention_mask: (B, T), 1 for real tokens.
        prompt_lengths: per row, number of prompt tokens, at least 1.
        layers: layers whose query heads are the candidates.
        window: W of WAAD, in tokens; at least 2 with row_offset -1.
        horizon: (lo, hi) of FAI, in tokens; hi None reaches to the end of the response.
        row_offset: 0: A[t, s] is the attention of the row at token t (the paper's text); -1: of the row that generates
            token t, the one before it. Distances are those between the tokens t and s in either case.
        fai_tail: FAI of the last lo tokens, after which no row is far enough: "undefined" (NaN), "zero", or "nearest",
            the attention of the last row.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        prompt_lengths: Sequence[int],
        layers: Sequence[int],
        window: int = 10,
        horizon: Horizon = (10, 100),
        row_offset: int = 0,
        fai_tail: str = "undefined",
    ):
        self.row_offset, self.fai_tail = row_offset, fai_tail
        if row_offset == -1:  # A'[t, s] = A[t - 1, s]: one row earlier, and every distance is one more
            attention_mask = without_last_token(attention_mask)
            prompt_lengths = [length - 1 for length in prompt_lengths]
            low, high = horizon
            window, horizon = window - 1, (max(low - 1, 0), None if high is None else high - 1)
        super().__init__(attention_mask, prompt_lengths, layers, window, horizon)

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        super().observe_sequence(row, query, key, layer)
        tail = min(self.horizon[0], query.shape[1] - self.prompt_lengths[row])
        if self.fai_tail == "nearest" and tail > 0:
            last = range(query.shape[1] - 1, query.shape[1])
            weights, _ = row_weights(query, key, layer.scaling, layer.sliding_window, last, 0)  # (H, 1, N)
            self._profiles[row][layer.layer_idx].fai[:, -tail:] = weights[:, 0, -tail:]

    def result(self) -> list[RhythmProfile]:
        """One profile per row, as `RhythmObserver.result`, for the n response tokens."""
        profiles = super().result()
        for profile in profiles:
            if self.row_offset == -1 and profile.fai.shape[1]:
                profile.waad = profile.waad + 1.0
                unseen = profile.fai.new_full((len(profile.heads), 1), torch.nan)  # no row generates after the last
                profile.fai = torch.cat([profile.fai[:, 1:], unseen], dim=1)
            if self.fai_tail == "zero":
                profile.fai = profile.fai.nan_to_num(nan=0.0)
        return profiles


class RewardObserver(SignalObserver):
    """Breadth and concentration of every response token too, for head sets that are known before the forward.

    Queries and keys of a row's global heads are kept until its last observed layer, so no more than one micro-batch of
    them is held.

    Args:
        heads: per row, the head sets.
        sink_tokens: first tokens of a sequence that breadth leaves out.
        options: as for `SignalObserver`, without `row_offset`.

    Attributes:
        measures: per row breadth and concentration, (n,) float32 each; `None` for a row without response tokens.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        prompt_lengths: Sequence[int],
        layers: Sequence[int],
        heads: Sequence[HeadSets],
        sink_tokens: int = 1,
        **options,
    ):
        super().__init__(attention_mask, prompt_lengths, layers, **options)
        self.heads, self.sink_tokens = list(heads), sink_tokens
        self.measures: list[tuple[Tensor, Tensor] | None] = [None] * len(self.spans)
        self._kept: dict[int, list[tuple[Tensor, Tensor, int | None]]] = {}

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        super().observe_sequence(row, query, key, layer)
        if query.shape[1] == self.prompt_lengths[row]:
            return
        chosen = [head for idx, head in self.heads[row].global_heads if idx == layer.layer_idx]
        if chosen:
            group = query.shape[0] // key.shape[0]
            key_heads = [head // group for head in chosen]
            self._kept.setdefault(row, []).append((query[chosen], key[key_heads], layer.sliding_window))
        if layer.layer_idx == max(self.layers):
            queries, keys, windows = zip(*self._kept.pop(row), strict=True)
            parts = self._profiles[row]
            fai = torch.stack([parts[idx].fai[head] for idx, head in self.heads[row].global_heads]).mean(dim=0)  # (n,)
            if self.fai_tail == "zero":
                fai = fai.nan_to_num(nan=0.0)
            self.measures[row] = breadth_and_concentration(
                queries,
                keys,
                fai,
                self.prompt_lengths[row],
                sink_tokens=self.sink_tokens,
                scaling=layer.scaling,
                windows=windows,
            )
