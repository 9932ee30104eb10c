"""Observers that turn a layer's queries and keys into the signals of AttnRL and AttnPO, one sequence at a time.

An observer is made for one batch and may see it in one forward or, as TRL computes old log-probs, in several forwards
of consecutive rows. Padding is cut off before anything is computed, so it costs nothing and changes nothing.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .capture import LayerAttention
from .pooling import lagged_step_attention, received_attention


INFLUENCE_AGGREGATIONS = ("sum", "mean")

StepRanges = Sequence[Sequence[tuple[int, int]]]


def real_token_spans(attention_mask: Tensor) -> list[tuple[int, int]]:
    """First column and number of the real tokens of each row of a (B, T) mask; (0, 0) for a row of padding only.

    Raises:
        ValueError: where a row's real tokens are not consecutive.
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; pass (B, T), 1 for real tokens.")
    real = attention_mask.bool()
    firsts, counts = real.int().argmax(dim=1), real.sum(dim=1)
    columns = torch.arange(real.shape[1], device=real.device)
    inside = (columns >= firsts[:, None]) & (columns < (firsts + counts)[:, None])
    holes = (inside != real).any(dim=1)
    firsts, counts, holes = torch.stack([firsts, counts, holes.long()]).tolist()
    if any(holes):
        raise ValueError(
            f"attention_mask row {holes.index(1)} has padding between real tokens; pad each row on the left, the "
            "right or both, and put one sequence in a row."
        )
    return list(zip(firsts, counts, strict=True))


def check_ranges(ranges: StepRanges, counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Step ranges as lists, checked: per row ascending, disjoint, none empty, within the row's real tokens.

    Rows without real tokens are given no steps.
    """
    if len(ranges) != len(counts):
        raise ValueError(f"step_ranges has {len(ranges)} rows, attention_mask {len(counts)}; pass one list per row.")
    checked = []
    for row, (steps, count) in enumerate(zip(ranges, counts, strict=True)):
        steps = [(int(start), int(end)) for start, end in steps] if count else []
        previous = 0
        for step, (start, end) in enumerate(steps):
            if not previous <= start < end <= count:
                raise ValueError(
                    f"step_ranges[{row}][{step}]={(start, end)}: ranges must ascend without overlap, hold a token "
                    f"each and end by {count}, the number of real tokens; positions leave padding out."
                )
            previous = end
        checked.append(steps)
    return checked


def check_positions(field: str, positions: Sequence[int], counts: Sequence[int]) -> list[int]:
    """One position per row, each from 0 to the row's number of real tokens; 0 for rows without real tokens."""
    if len(positions) != len(counts):
        raise ValueError(f"{field} has {len(positions)} entries, attention_mask {len(counts)} rows; pass one per row.")
    checked = []
    for row, (position, count) in enumerate(zip(positions, counts, strict=True)):
        position = int(position) if count else 0
        if not 0 <= position <= count:
            raise ValueError(
                f"{field}[{row}]={position}: must be from 0 to {count}, the number of real tokens; positions leave "
                "padding out."
            )
        checked.append(position)
    return checked


class BatchObserver(ABC):
    """Hands each sequence of a batch, padding cut off, to `observe_sequence`, and counts the rows seen per layer.

    Args:
        attention_mask: (B, T), 1 for real tokens.
        layers: layers to observe; None for all.
    """

    def __init__(self, attention_mask: Tensor, layers: frozenset[int] | None):
        self.layers = layers
        self.spans = real_token_spans(attention_mask)
        self.width = attention_mask.shape[1]
        self._rows_seen: Counter[int] = Counter()

    @abstractmethod
    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        """Take query (H, n, D) and key (Hkv, n, D) of the n real tokens of `row` in `layer`."""

    def observe(self, layer: LayerAttention) -> None:
        """Take the next rows of the batch in one layer.

        Raises:
            ValueError: where the forward's batch does not fit the attention mask the observer was made with.
        """
        rows, width = layer.query.shape[0], layer.query.shape[2]
        first = self._rows_seen[layer.layer_idx]
        if width != self.width or first + rows > len(self.spans):
            raise ValueError(
                f"attention_mask has {len(self.spans)} rows of {self.width} tokens, the forward showed rows {first} "
                f"to {first + rows - 1} of {width}; make one observer per batch, with the mask that its forward gets."
            )
        for i in range(rows):
            start, count = self.spans[first + i]
            if count:
                columns = slice(start, start + count)
                self.observe_sequence(first + i, layer.query[i, :, columns], layer.key[i, :, columns], layer)
        self._rows_seen[layer.layer_idx] += rows

    def check_complete(self) -> None:
        """Raise a ValueError unless every row was seen in every layer."""
        layers = self.layers if self.layers is not None else self._rows_seen.keys() or {0}
        missing = {layer: self._rows_seen[layer] for layer in layers if self._rows_seen[layer] != len(self.spans)}
        if missing:
            raise ValueError(
                f"result() needs {len(self.spans)} rows per layer, seen so far {missing}; run the forward of the "
                "whole batch inside observe_attention first."
            )


class InfluenceObserver(BatchObserver):
    """Forward context influence of every step (AttnRL eq. 4 to 6), over all layers and heads.

    alpha[j, k] = mean over the query tokens of step j and the key tokens of step k of the attention weights;
    y_k = max over layers and query heads of the sum (or mean) over steps j >= k + delta of alpha[j, k]. Zero for the
    prompt, the first response step, the last delta steps and, where thinking ends, from the step that ends it on.

    Args:
        attention_mask: (B, T), 1 for real tokens.
        step_ranges: per row, half-open (start, end) token ranges, entry 0 the prompt; padding is not counted.
        stop_steps: per row, index of the step that holds the end of thinking, or -1; None for no such step in any row.
        delta: least distance in steps between a step and those whose attention counts.
        aggregation: over the later steps, "sum" (published) or "mean", which does not favour early steps by the number
            of steps that follow them.

    Raises:
        ValueError: for ranges that overlap or leave the sequence, a negative delta and an unknown aggregation.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        step_ranges: StepRanges,
        stop_steps: Sequence[int] | None = None,
        delta: int = 4,
        aggregation: str = "sum",
    ):
        super().__init__(attention_mask, layers=None)
        if aggregation not in INFLUENCE_AGGREGATIONS:
            raise ValueError(
                f"influence_aggregation={aggregation!r} is unknown; set it to one of "
                f"{', '.join(INFLUENCE_AGGREGATIONS)}."
            )
        if delta < 0:
            raise ValueError(f"delta={delta}: the distance between steps must be 0 or more (the paper uses 4).")
        self.steps = check_ranges(step_ranges, [count for _, count in self.spans])
        stops = [-1] * len(self.steps) if stop_steps is None else [int(stop) for stop in stop_steps]
        if len(stops) != len(self.steps):
            raise ValueError(f"stop_steps has {len(stops)} entries, step_ranges {len(self.steps)}; pass one per row.")
        self.delta, self.aggregation = delta, aggregation
        self._columns = [
            range(2, min(len(steps) - delta, stop if stop > 0 else len(steps)))
            for steps, stop in zip(self.steps, stops, strict=True)
        ]
        self._influence = [
            torch.zeros(len(steps), dtype=torch.float32, device=attention_mask.device) for steps in self.steps
        ]

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        columns = self._columns[row]
        if not columns:
            return
        best = self._influence[row][columns.start : columns.stop]
        torch.maximum(best, self.of_heads(row, query, key, layer).amax(dim=0).to(best.device), out=best)

    def of_heads(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> Tensor:
        """(H, columns) influence of one layer's heads on the steps that can have some."""
        return lagged_step_attention(
            query,
            key,
            layer.scaling,
            layer.sliding_window,
            self.steps[row],
            self._columns[row],
            self.delta,
            self.aggregation,
        )

    def result(self) -> list[Tensor]:
        """Per row (num_ranges,) float32 y, on the mask's device; empty for a row without real tokens.

        Raises:
            ValueError: where a layer has not shown every row.
        """
        self.check_complete()
        return self._influence


class KeyFocusObserver(BatchObserver):
    """Attention of the final answer to every thinking step in the key-focus heads (AttnPO, section on step scores).

    S_k = (1 / |s_k|) sum over answer tokens m and tokens n of step k of the attention weight m -> n: a sum over the
    answer's rows, a mean over the step's tokens. The weights are those over the whole context. Work is done in the
    layers that own a head, for the answer's rows only.

    Args:
        attention_mask: (B, T), 1 for real tokens.
        step_ranges: per row, half-open (start, end) ranges of the thinking steps, counted from the first real token.
        answer_starts: per row, position of the first answer token; the answer ends with the sequence.
        heads: (layer, query head) pairs, from 0.
        average: whether to average over the heads.

    Raises:
        ValueError: for ranges or starts outside the sequence, no heads, or a head given twice.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        step_ranges: StepRanges,
        answer_starts: Sequence[int],
        heads: Sequence[tuple[int, int]],
        average: bool = True,
    ):
        self.heads = [(int(layer), int(head)) for layer, head in heads]
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads={list(heads)}: give at least one (layer, head) pair, and each pair once.")
        super().__init__(attention_mask, layers=frozenset(layer for layer, _ in self.heads))
        self.steps = check_ranges(step_ranges, [count for _, count in self.spans])
        self.answer_starts = check_positions("answer_starts", answer_starts, [count for _, count in self.spans])
        self.average = average
        self._scores = [
            torch.zeros(len(self.heads), len(steps), dtype=torch.float32, device=attention_mask.device)
            for steps in self.steps
        ]

    def observe_sequence(self, row: int, query: Tensor, key: Tensor, layer: LayerAttention) -> None:
        places = [place for place, (layer_idx, _) in enumerate(self.heads) if layer_idx == layer.layer_idx]
        heads = [self.heads[place][1] for place in places]
        if not 0 <= min(heads) <= max(heads) < query.shape[0]:
            raise ValueError(
                f"heads={heads} of layer {layer.layer_idx}: the model has heads up to {query.shape[0] - 1}."
            )
        if not self.steps[row] or self.answer_starts[row] == query.shape[1]:
            return
        received = received_attention(
            query, key, layer.scaling, layer.sliding_window, heads, self.answer_starts[row]
        )  # (heads, n)
        # In float64, so that the difference of two running sums is exact enough for a step of one token.
        running = torch.nn.functional.pad(received.double().cumsum(dim=-1), (1, 0))
        starts, ends = torch.tensor(self.steps[row], device=running.device).T  # (steps,) each
        means = (running[:, ends] - running[:, starts]) / (ends - starts)
        self._scores[row][places] = means.to(self._scores[row])

    def result(self) -> list[Tensor]:
        """Per row (num_steps,) float32 scores or, without averaging, (num_heads, num_steps) in the order of `heads`.

        Zero where the answer has no token; no steps for a row without real tokens.

        Raises:
            ValueError: where a layer has not shown every row.
        """
        self.check_complete()
        return [scores.mean(dim=0) if self.average else scores for scores in self._scores]
