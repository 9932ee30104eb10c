"""Head sets over many responses: pooled backward spans, and head sets that are calibrated once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import Head, RhythmProfile, rank_heads
from ..attention.heads import HeadSets


@dataclass
class PooledSpans:
    """Backward spans summed over response tokens; sums of several batches and ranks add up.

    Attributes:
        span_sum: (C,) float64, per candidate head, in tokens.
        tokens: response tokens that were summed over.
        responses: responses with at least one token.
    """

    span_sum: Tensor
    tokens: int
    responses: int

    @classmethod
    def of(cls, profiles: Sequence[RhythmProfile]) -> "PooledSpans":
        lengths = [profile.waad.shape[1] for profile in profiles]
        span_sum = torch.stack([profile.span_sum for profile in profiles]).double().sum(dim=0)
        return cls(span_sum, sum(lengths), sum(length > 0 for length in lengths))

    def __add__(self, other: "PooledSpans") -> "PooledSpans":
        return PooledSpans(
            self.span_sum + other.span_sum, self.tokens + other.tokens, self.responses + other.responses
        )

    def rank(self, heads: Sequence[Head], fraction: float) -> HeadSets:
        """Head sets by mean backward span, every token weighing the same (rhythm Eq 7, section 4.1)."""
        return HeadSets(*rank_heads(self.span_sum / max(self.tokens, 1), heads, fraction))


class HeadCalibration:
    """Head sets fixed from the first responses of the policy.

    Spans are summed batch by batch until enough responses were seen; until then there are no head sets.

    Args:
        responses: number of responses that a calibration takes at least.
        refresh_every: batches after which a calibration is begun anew, the old head sets staying until it is done; 0:
            never.
        fraction: share of the candidates in each set.
    """

    def __init__(self, responses: int, refresh_every: int, fraction: float):
        self.responses, self.refresh_every, self.fraction = responses, refresh_every, fraction
        self.heads: HeadSets | None = None
        self._spans: PooledSpans | None = None
        self._batches_since = 0

    def update(self, spans: PooledSpans, candidates: Sequence[Head]) -> None:
        """Take the spans of one batch, pooled over all ranks."""
        if self.heads is not None:
            self._batches_since += 1
            if not self.refresh_every or self._batches_since < self.refresh_every:
                return
        spans = PooledSpans(spans.span_sum.cpu(), spans.tokens, spans.responses)
        self._spans = spans if self._spans is None else self._spans + spans
        if self._spans.responses >= self.responses:
            self.heads = self._spans.rank(candidates, self.fraction)
            self._spans, self._batches_since = None, 0

    def state_dict(self) -> dict:
        """JSON types."""
        spans = self._spans
        return {
            "heads": None if self.heads is None else [[list(head) for head in heads] for heads in self.heads],
            "spans": None if spans is None else [spans.span_sum.tolist(), spans.tokens, spans.responses],
            "batches_since": self._batches_since,
        }

    def load_state_dict(self, state: dict) -> None:
        self.heads = state["heads"] and HeadSets(*([tuple(head) for head in heads] for heads in state["heads"]))
        spans = state["spans"]
        self._spans = spans and PooledSpans(torch.tensor(spans[0], dtype=torch.float64), *spans[1:])
        self._batches_since = state["batches_since"]
