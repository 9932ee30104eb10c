"""What a model's attention says about its own reasoning: capture, pooling and the signals of the three methods."""

from collections.abc import Sequence

from torch import Tensor, nn

from attn_trainers.attention.capture import (
    AttentionObserver,
    LayerAttention,
    forward_for_attention,
    observe_attention,
)
from attn_trainers.attention.signals import InfluenceObserver


__all__ = [
    "AttentionObserver",
    "InfluenceObserver",
    "LayerAttention",
    "forward_context_influence",
    "forward_for_attention",
    "observe_attention",
]


def forward_context_influence(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    step_ranges: Sequence[Sequence[tuple[int, int]]],
    stop_steps: Sequence[int] | None = None,
    delta: int = 4,
) -> list[Tensor]:
    """Forward context influence y_k of every step (AttnRL, arXiv 2509.26628, eq. 4 to 6), in a forward of its own.

    alpha[j, k] is the mean attention weight from the tokens of step j to the tokens of step k, and
    y_k = max over layers and query heads of the sum over j >= k + delta of alpha[j, k]. Zero for the prompt (entry 0),
    the first response step, the last delta steps and, where thinking ends in step s, every k >= s.

    Args:
        model: transformers decoder, plain or wrapped.
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; right- or left-padded.
        step_ranges: per sequence, half-open (start, end) token ranges, entry 0 the whole prompt; positions count from
            the sequence's first real token.
        stop_steps: per sequence, index of the step that holds the end of thinking, or -1.
        delta: least distance in steps.

    Returns:
        Per sequence (num_ranges,) float32, an attention weight per query and key token; empty for a row of padding.

    Raises:
        ValueError: for ranges that overlap or leave their sequence, or an architecture that cannot be observed.
    """
    observer = InfluenceObserver(attention_mask, step_ranges, stop_steps, delta)
    forward_for_attention(model, input_ids, attention_mask, observer)
    return observer.result()
