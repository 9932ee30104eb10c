"""What a model's attention says about its own reasoning: capture, pooling and the signals of the three methods."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .capture import AttentionObserver, LayerAttention, decoder_of, forward_for_attention, observe_attention
from .heads import Head, middle_layers, rank_heads
from .observers import InfluenceObserver, KeyFocusObserver
from .rhythm import Horizon, RhythmObserver, RhythmProfile, RhythmSignals, combine_heads, mean_backward_span


__all__ = [
    "AttentionObserver",
    "Head",
    "Horizon",
    "InfluenceObserver",
    "KeyFocusObserver",
    "LayerAttention",
    "RhythmObserver",
    "RhythmProfile",
    "RhythmSignals",
    "combine_heads",
    "forward_context_influence",
    "forward_for_attention",
    "key_focus_scores",
    "mean_backward_span",
    "middle_layers",
    "observe_attention",
    "rank_heads",
    "rhythm_signals",
]


def forward_context_influence(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    step_ranges: Sequence[Sequence[tuple[int, int]]],
    stop_steps: Sequence[int] | None = None,
    delta: int = 4,
    aggregation: str = "sum",
) -> list[Tensor]:
    """Forward context influence y_k of every step (AttnRL, arXiv 2509.26628, eq. 4 to 6), in a forward of its own.

    alpha[j, k] is the mean attention weight from the tokens of step j to the tokens of step k, and
    y_k = max over layers and query heads of the sum (or mean) over j >= k + delta of alpha[j, k]. Zero for the prompt
    (entry 0), the first response step, the last delta steps and, where thinking ends in step s, every k >= s.

    Args:
        model: transformers decoder, plain or wrapped.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; right- or left-padded.
        step_ranges: per sequence, half-open (start, end) token ranges, entry 0 the whole prompt; positions count from
            the sequence's first real token.
        stop_steps: per sequence, index of the step that holds the end of thinking, or -1.
        delta: least distance in steps.
        aggregation: over the later steps j, "sum" (published) or "mean".

    Returns:
        Per sequence (num_ranges,) float32, an attention weight per query and key token; empty for a row of padding.

    Raises:
        ValueError: for ranges that overlap or leave their sequence, an unknown aggregation, or an architecture that
            cannot be observed.
    """
    observer = InfluenceObserver(attention_mask, step_ranges, stop_steps, delta, aggregation)
    forward_for_attention(model, input_ids, attention_mask, observer)
    return observer.result()


def key_focus_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    step_ranges: Sequence[Sequence[tuple[int, int]]],
    answer_starts: Sequence[int],
    heads: Sequence[Head],
) -> list[Tensor]:
    """Attention of the final answer to every thinking step in the key-focus heads (AttnPO), in a forward of its own.

    S_k = mean over the heads of (1 / |s_k|) sum over answer tokens m and tokens n of step k of the weight m -> n: a
    sum over the answer's rows, a mean over the step's tokens. The forward stops after the last layer that owns a head.

    Args:
        model: transformers decoder, plain or wrapped.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; right- or left-padded.
        step_ranges: per sequence, half-open (start, end) token ranges of the thinking steps, counted from the
            sequence's first real token.
        answer_starts: per sequence, position of the first answer token; the answer ends with the sequence.
        heads: (layer, query head) pairs, from 0.

    Returns:
        Per sequence (num_steps,) float32, 0 to the number of answer tokens.

    Raises:
        ValueError: for ranges, starts or heads that do not exist, or an architecture that cannot be observed.
    """
    observer = KeyFocusObserver(attention_mask, step_ranges, answer_starts, heads)
    forward_for_attention(model, input_ids, attention_mask, observer)
    return observer.result()


def rhythm_signals(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_lengths: Sequence[int],
    *,
    layers: Iterable[int] | None = None,
    head_fraction: float = 0.3,
    window: int = 10,
    horizon: Horizon = (10, 100),
    head_scope: str | tuple[Sequence[Head], Sequence[Head]] = "sequence",
) -> list[RhythmSignals]:
    """WAAD and FAI of every response token (arXiv 2510.13554, eq. 7 to 10), in a forward of its own.

    Args:
        model: transformers decoder, plain or wrapped.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; right- or left-padded.
        prompt_lengths: per sequence, number of prompt tokens, padding left out; the rest is the response.
        layers: layers whose heads are ranked; None for five in the middle third.
        head_fraction: share of the heads in the local and in the global set.
        window: W of WAAD, in tokens.
        horizon: (lo, hi) of FAI, in tokens; hi None reaches to the end of the response.
        head_scope: "sequence" ranks the heads for each sequence, "batch" over all tokens of the batch; a pair of head
            lists (local, global) is used as given.

    Returns:
        One `RhythmSignals` per sequence, for its n response tokens; n = 0 for a row of padding.

    Raises:
        ValueError: for arguments out of range, or an architecture that cannot be observed.
    """
    if isinstance(head_scope, str) and head_scope not in ("sequence", "batch"):
        raise ValueError(f'head_scope="{head_scope}": use "sequence", "batch" or a pair of head lists.')
    if layers is None:
        layers = middle_layers(decoder_of(model).config.num_hidden_layers)
    observer = RhythmObserver(attention_mask, prompt_lengths, layers, window, horizon)
    forward_for_attention(model, input_ids, attention_mask, observer)
    profiles = observer.result()
    if head_scope == "sequence":
        chosen = [rank_heads(mean_backward_span([one]), one.heads, head_fraction) for one in profiles]
    elif head_scope == "batch":
        chosen = [rank_heads(mean_backward_span(profiles), profiles[0].heads, head_fraction)] * len(profiles)
    else:
        chosen = [head_scope] * len(profiles)
    return [combine_heads(one, *heads) for one, heads in zip(profiles, chosen, strict=True)]
