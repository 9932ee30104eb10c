"""What trainers share that weigh each token's advantage by the model's attention: capture, metrics, rank safety.

A method built on it is a file of pure functions and a thin trainer: it names an observer for a batch of completions,
and turns what the observer saw into credit factors per token. Rollouts, rewards and advantages stay TRL's.
"""

import time
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ..attention import AttentionObserver, LayerAttention, forward_for_attention, observe_attention
from .checkpoints import check_save_interval
from .trainer import BaseTrainer


@dataclass(frozen=True)
class CompletionBatch:
    """This rank's prompts and completions as they enter the forward for old log-probs.

    Attributes:
        input_ids: (B, P+T), prompts padded on the left, completions on the right.
        attention_mask: (B, P+T), 1 on real tokens; 0 on all of a completion that is masked out.
        completion_width: T.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_width: int

    @property
    def prompt_lengths(self) -> list[int]:
        return self.attention_mask[:, : -self.completion_width].sum(dim=1).tolist()

    @property
    def completion_ids(self) -> list[list[int]]:
        """Real completion tokens of each row."""
        ids = self.input_ids[:, -self.completion_width :].tolist()
        lengths = self.attention_mask[:, -self.completion_width :].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]


class _TimedObserver:
    """Adds up the seconds an observer takes (on a GPU: to enqueue its work)."""

    def __init__(self, observer: AttentionObserver):
        self.observer = observer
        self.layers = observer.layers
        self.seconds = 0.0

    def observe(self, layer: LayerAttention) -> None:
        start = time.perf_counter()
        self.observer.observe(layer)
        self.seconds += time.perf_counter() - start


class AttentionCreditTrainer(BaseTrainer):
    """
    Base of trainers whose per-token credit comes from attention.

    The signal is read in the no-grad forward that TRL makes for old log-probs; where TRL makes none, in one forward up
    to the last layer that is needed. `_compute_loss` multiplies the advantages by the factors and calls the parent:
    with all factors 1, the loss is bit-equal to the parent's. In evaluation nothing differs from [`~trl.GRPOTrainer`].

    A subclass implements `make_observer` and `assign_credit`. Both are called on every rank in every training batch.
    """

    # Name under which metrics appear, e.g. "attnpo".
    metric_prefix: str
    # Whether `entropies` is wanted: the entropy at each completion token, from the same forward.
    needs_entropies = False

    def __init__(self, model, reward_funcs, args, **kwargs):
        for name in ("tools", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name} is set, but {type(self).__name__} reads single-turn completions; unset it.")
        super().__init__(model, reward_funcs, args=args, **kwargs)
        check_save_interval(args)
        self.rewards_per_func: Tensor | None = None
        self.entropies: Tensor | None = None
        self._awaits_signal = False
        self._batch: CompletionBatch | None = None
        self._observer: _TimedObserver | None = None

    @abstractmethod
    def make_observer(self, batch: CompletionBatch) -> AttentionObserver | None:
        """An observer of this batch, or `None` where no signal is needed (the same on every rank)."""

    @abstractmethod
    def assign_credit(self, output: dict[str, Tensor], batch: CompletionBatch, observer: AttentionObserver | None):
        """Set `output["credit"]`, (B, T) factors of the advantages, and change `output["advantages"]` if need be.

        Args:
            output: what TRL's `_generate_and_score_completions` returned; `completion_ids` etc. are (B, T).
            batch: the rows the observer saw, in the same order.
            observer: what `make_observer` returned, having seen all rows.
        """

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to the mean that is logged as `<metric_prefix>/<name>`."""
        self._metrics["train"][f"{self.metric_prefix}/{name}"].append(value)

    def mean_over_ranks(self, total: float, count: float) -> float:
        """Sum of totals over sum of counts over all ranks, NaN where nothing was counted; a collective."""
        sums = torch.tensor([total, count], dtype=torch.float32, device=self.accelerator.device)
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / count if count else float("nan")

    def log_means(self, totals: dict[str, tuple[float, float]]) -> None:
        """Log each value's sum over its count, both over all ranks, in one collective; names are the same on all."""
        sums = torch.tensor(list(totals.values()), dtype=torch.float64, device=self.accelerator.device)  # (N, 2)
        for name, (total, count) in zip(totals, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True):
            self.log_metric(name, total / count if count else float("nan"))

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._awaits_signal = self._parent_reads_old_logps
        output = super()._generate_and_score_completions(inputs)
        if self._batch is None:
            self._read_signal_alone(output)
        observer = self._observer
        self.assign_credit(output, self._batch, observer.observer if observer else None)
        self.log_metric("seconds/attention", observer.seconds if observer else 0.0)
        self._batch = self._observer = self.entropies = None
        return output

    @property
    def _parent_reads_old_logps(self) -> bool:
        """TRL's condition for a forward over the policy before the reference model's (which, with an adapter, is the
        policy's own model with the adapter off)."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        misaligned = self.args.gradient_accumulation_steps % generate_every != 0
        return misaligned or (self.use_vllm and self.vllm_importance_sampling_correction)

    def _begin_signal(self, input_ids: Tensor, attention_mask: Tensor, completion_width: int) -> None:
        self._awaits_signal = False
        self._batch = CompletionBatch(input_ids, attention_mask, completion_width)
        observer = self.make_observer(self._batch)
        self._observer = _TimedObserver(observer) if observer is not None else None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        parent = super()._get_per_token_logps_and_entropies
        # The first forward of a training batch over the policy is TRL's for old log-probs; the loss comes later.
        if not self._awaits_signal or model is not self.model or torch.is_grad_enabled():
            return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        self._begin_signal(input_ids, attention_mask, logits_to_keep)
        if self.needs_entropies:
            kwargs["compute_entropy"] = True
        with observe_attention(self.model, self._observer) if self._observer else nullcontext():
            logps, entropies, aux_loss = parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        self.entropies = entropies
        return logps, entropies, aux_loss

    def _read_signal_alone(self, output: dict[str, Tensor]) -> None:
        """A forward for the signal, where TRL made none over the policy."""
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)  # (B, P+T)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)  # (B, P+T)
        self._begin_signal(input_ids, attention_mask, output["completion_ids"].size(1))
        if self._observer or self.needs_entropies:
            self.entropies = self.forward_for_signal(self._batch, self._observer)

    def forward_for_signal(self, batch: CompletionBatch, observer: AttentionObserver | None) -> Tensor | None:
        """Show a batch's attention to an observer, in micro-batches; every rank must call it.

        Returns:
            Entropies (B, T) where the trainer wants them.
        """
        size = self.args.per_device_train_batch_size
        # A sharded model makes all its forwards alike: after one with the plain output head, DeepSpeed (0.19) had lost
        # the weights of TRL's fused head in the backward of the loss.
        as_trl_does = self.needs_entropies or self.is_deepspeed_enabled or self.is_fsdp_enabled
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if as_trl_does:
                with observe_attention(self.model, observer) if observer else nullcontext():
                    _, entropies, _ = super()._get_per_token_logps_and_entropies(
                        self.model,
                        batch.input_ids,
                        batch.attention_mask,
                        batch.completion_width,
                        size,
                        self.needs_entropies,
                    )
                return entropies
            for start in range(0, batch.input_ids.size(0), size):
                rows = slice(start, start + size)
                forward_for_attention(self.model, batch.input_ids[rows], batch.attention_mask[rows], observer)
        return None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewards_per_func = rewards  # (ranks·B, F); not in TRL's output
        return rewards

    def _compute_loss(self, model, inputs):
        if "credit" in inputs:
            advantages = inputs["advantages"]
            if advantages.dim() == 1:
                advantages = advantages.unsqueeze(1)  # (B, 1)
            inputs = {**inputs, "advantages": advantages * inputs["credit"]}  # (B, T)
        return super()._compute_loss(model, inputs)
