"""Forwards without gradients over completions: log-probs, entropies, and what an observer sees meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

from ..attention import AttentionObserver, LayerAttention, observe_attention
from .credit import CompletionBatch, SignalPass


class TimedObserver:
    """Adds up the seconds an observer takes (on a GPU: to enqueue its work)."""

    def __init__(self, observer: AttentionObserver):
        self.observer = observer
        self.layers = observer.layers
        self.seconds = 0.0

    def observe(self, layer: LayerAttention) -> None:
        start = time.perf_counter()
        self.observer.observe(layer)
        self.seconds += time.perf_counter() - start


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off, an adapter's too: what is read without gradients must not depend on it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def observed(model: nn.Module, observer: AttentionObserver | None):
    """Context in which an observer sees the model's attention; without one, nothing happens."""
    return nullcontext() if observer is None else observe_attention(model, observer)


def timed(observer: AttentionObserver | None) -> TimedObserver | None:
    """The observer with a clock, if there is one."""
    return None if observer is None else TimedObserver(observer)


def signal_pass(batch: CompletionBatch, observer: TimedObserver | None, entropies: Tensor | None) -> SignalPass:
    """What a forward over a batch showed."""
    if observer is None:
        return SignalPass(batch, entropies=entropies)
    return SignalPass(batch, observer.observer, entropies, observer.seconds)


class ForwardMixin:
    """No-grad forwards of a `GRPOTrainer` subclass (named before it in the bases); every rank makes them alike."""

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with without_dropout(model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def observing(self, observer: AttentionObserver | None):
        """Context in which an observer sees the rows of forwards over the model that is trained."""
        return observed(self.model, observer)

    def forward_completions(
        self,
        batch: CompletionBatch,
        *,
        observer: AttentionObserver | None = None,
        compute_entropy: bool = False,
        model: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One no-grad forward over a batch, in micro-batches, by TRL's own path and so under the run's autocast.

        Args:
            batch: rows of this rank.
            observer: sees the attention of the model that is trained.
            compute_entropy: whether entropies are wanted.
            model: another model than the one that is trained.
            batch_size: rows of a micro-batch, `per_device_train_batch_size` by default.

        Returns:
            Log-probs (B, T) of the completion tokens, and their entropies (B, T) or `None`.
        """
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, self.observing(observer):
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model if model is None else model,
                batch.input_ids,
                batch.attention_mask,
                batch.completion_width,
                batch_size=batch_size or self.args.per_device_train_batch_size,
                compute_entropy=compute_entropy,
            )
        return logps, entropies
