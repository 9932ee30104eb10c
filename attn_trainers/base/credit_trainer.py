"""GRPO whose advantages a credit method weighs per token."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from trl.trainer.utils import RepeatSampler

from ..attention import AttentionObserver, forward_for_attention
from .checkpoints import restart_order
from .config import MethodConfig
from .credit import (
    BatchCredit,
    CompletionBatch,
    CreditContext,
    CreditMethod,
    RowFacts,
    SignalPass,
    group_accuracies,
    mean_factors,
    weighted_rewards,
)
from .forwards import TimedObserver, observed, signal_pass, timed, without_dropout
from .trainer import BaseTrainer


@dataclass
class _Scored:
    """What TRL's flow computes of a generation batch on its way, for all ranks' rows.

    Attributes:
        signal: what the forward for old log-probs showed; `None` where there was none.
        shaped: (N, F) rewards that advantages are made of.
        correct: (N,) 1 or 0, NaN where it could not be said.
    """

    signal: SignalPass | None = None
    shaped: Tensor | None = None
    correct: Tensor | None = None


class CreditTrainer(BaseTrainer):
    """
    GRPO with a factor per token on the advantages. Rollouts, rewards and groups stay TRL's.

    The signal is read in the no-grad forward that TRL makes for old log-probs; where TRL makes none, in one forward up
    to the last layer that is needed. The loss multiplies the advantages by the factors: with all factors 1 it is
    bit-equal to TRL's. In evaluation nothing differs from [`~trl.GRPOTrainer`].

    Args:
        model, reward_funcs, args, more, kwargs: as for [`~trl.GRPOTrainer`].
        credit: the credit method; by default the one that the settings describe (`credit_of`).

    Attributes:
        credit: the credit method.
        generated_tokens: tokens sampled for the generation batches so far, on all ranks.
        last_credit: what it answered for the latest generation batch.
        last_rewards_per_func: (ranks·B, F) shaped rewards of the latest generation batch.
    """

    config_class = MethodConfig
    metric_prefix = "credit"

    def __init__(self, model, reward_funcs=None, args=None, *more, credit: CreditMethod | None = None, **kwargs):
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.credit = credit if credit is not None else self.credit_of(self.args)
        self.credit.setup(self.model, self._tokenizer, self.reward_func_names, self.args.seed)
        self.line_fields |= self.credit.line_fields
        self.generated_tokens = 0
        self.last_credit = BatchCredit()
        self.last_rewards_per_func: Tensor | None = None
        self._order: RepeatSampler | None = None  # of the prompts, once there is a loader of them
        self._scored: _Scored | None = None  # while a generation batch is on its way through TRL

    @staticmethod
    def credit_of(args) -> CreditMethod:
        """The credit method that the settings describe."""
        raise ValueError("credit=None: give a credit method, or use a trainer that has one of its own.")

    def card_settings(self) -> dict[str, object]:
        return super().card_settings() | self.credit.settings()

    # ---- the order of the prompts ----------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        self._order = super()._get_train_sampler(dataset)
        return self._order

    def _run_epoch(self, **kwargs):
        """Go on, after a resume, in the order of this epoch and at the place in its generation batch."""
        if self._order is not None:
            restart_order(self._order, kwargs["epoch"])
        is_resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        if is_resumed and not self.args.ignore_data_skip:
            self._step = kwargs["steps_trained_in_current_epoch"]  # an epoch holds whole generation batches
        super()._run_epoch(**kwargs)

    # ---- the generation batch ---------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        with self._scoring() as scored:
            output = super()._generate_and_score_completions(inputs)
        signal = scored.signal or self._read_signal_alone(CompletionBatch.of(output))
        self._assign_credit(output, signal, scored)
        return output

    @contextmanager
    def _scoring(self):
        self._scored = _Scored()
        try:
            yield self._scored
        finally:
            self._scored = None

    def _assign_credit(self, output: dict[str, Tensor], signal: SignalPass, scored: _Scored) -> None:
        """Set `output["credit"]`, (B, T), and change `output["advantages"]` if the method has its own."""
        rows = output["completion_ids"].size(0)
        local = slice(self.ranks.index * rows, (self.ranks.index + 1) * rows)
        groups = self._groups(len(scored.correct))
        rewards = weighted_rewards(scored.shaped, self.reward_weights)  # (ranks·B,)
        advantages = self.credit.advantages(rewards, groups)
        if advantages is not None:
            output["advantages"] = advantages[local]
            self._logs["advantages"].extend(advantages.tolist())  # in place of the group-mean ones just logged
        facts = RowFacts(
            keys=[str(row) for row in range(local.start, local.stop)],
            correct=scored.correct[local],
            accuracies=group_accuracies(scored.correct, groups)[local],
        )
        context = CreditContext(
            ranks=self.ranks,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            observe=self._observe_batch,
            folder=Path(self.args.output_dir),
            rewards=rewards,
            group_size=self.num_generations,
        )
        credit = self.credit.factors([signal], [output["advantages"][:, None]], [facts], context)
        if credit.advantages is not None:
            output["advantages"] = credit.advantages[0]
        if credit.factors is not None:
            output["credit"] = credit.factors[0].to(output["advantages"].device)
        self.log_values(credit.values | {"seconds/attention": signal.seconds}, self.credit.prefix)
        self.log_means(credit.totals, self.credit.prefix)
        if self.log_completions:
            columns = {f"{self.credit.prefix}/{name}": values for name, values in credit.columns.items()}
            columns["credit"] = mean_factors(signal.batch, credit.factors[0]) if credit.factors else [1.0] * rows
            for name, values in columns.items():
                self.add_column(name, self.ranks.gather_list(values))
        self.offer_page(self.credit, credit, [signal], [output["advantages"].view(rows, -1)])
        self.last_credit, self.last_rewards_per_func = credit, scored.shaped
        self.credit.report(credit, context)

    def _groups(self, num_rows: int) -> Tensor:
        """(N,) index of each row's prompt: the rows of a prompt follow each other."""
        return torch.arange(num_rows, device=self.accelerator.device) // self.num_generations

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (ranks·B, F)
        if self._scored is None:
            return rewards
        thinking = self.thinking_lengths(prompts, completion_ids_list)
        self.log_means({"completions/mean_thinking_length": (float(sum(thinking)), float(len(thinking)))}, "")
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        lengths = self.ranks.gather(lengths)  # (ranks·B,)
        self.generated_tokens += int(lengths.sum())
        groups = self._groups(len(lengths))
        self._scored.correct = self.credit.judge(rewards, self.reward_weights)
        self._scored.shaped = self.credit.shape_rewards(rewards, lengths, groups)
        self.log_values(self.credit.reward_metrics(self._scored.correct, lengths, groups), self.credit.prefix)
        return self._scored.shaped

    # ---- the signal -------------------------------------------------------------------------------------------------

    @property
    def _parent_reads_old_logps(self) -> bool:
        """TRL's condition for a forward over the policy before the reference model's (which, with an adapter, is the
        policy's own model with the adapter off)."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        misaligned = self.args.gradient_accumulation_steps % generate_every != 0
        return misaligned or (self.use_vllm and self.vllm_importance_sampling_correction)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        parent = super()._get_per_token_logps_and_entropies
        # The first forward of a generation batch over the policy is TRL's for old log-probs; the loss comes later.
        awaited = self._scored is not None and self._scored.signal is None and self._parent_reads_old_logps
        if not awaited or model is not self.model:
            return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        batch = CompletionBatch(input_ids, attention_mask, logits_to_keep)
        observer = self._timed_observer(batch)
        if self.credit.needs_entropies:
            kwargs["compute_entropy"] = True
        with observed(self.model, observer):
            logps, entropies, aux_loss = parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        self._scored.signal = signal_pass(batch, observer, entropies)
        return logps, entropies, aux_loss

    def _timed_observer(self, batch: CompletionBatch) -> TimedObserver | None:
        with self.timed("alignment"):
            return timed(self.credit.observer(batch))

    def _read_signal_alone(self, batch: CompletionBatch) -> SignalPass:
        """A forward for the signal, where TRL made none over the policy."""
        observer = self._timed_observer(batch)
        if observer is None and not self.credit.needs_entropies:
            return SignalPass(batch)
        return signal_pass(batch, observer, self._observe_batch(batch, observer))

    def _observe_batch(self, batch: CompletionBatch, observer: AttentionObserver | None) -> Tensor | None:
        """Show a batch's attention to an observer, in micro-batches; every rank must call it.

        Returns:
            Entropies (B, T) where the credit method wants them.
        """
        # A sharded model makes all its forwards alike: after one with the plain output head, DeepSpeed (0.19) had lost
        # the weights of TRL's fused head in the backward of the loss.
        if self.credit.needs_entropies or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return self.forward_completions(batch, observer=observer, compute_entropy=self.credit.needs_entropies)[1]
        size = self.args.per_device_train_batch_size
        with without_dropout(self.model), self.accelerator.autocast():
            for start in self.progress(range(0, batch.input_ids.size(0), size), "Attention"):
                rows = slice(start, start + size)
                forward_for_attention(self.model, batch.input_ids[rows], batch.attention_mask[rows], observer)
        return None

    # ---- logs and state ---------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        logged, name = self._metrics["train"], f"{self.credit.prefix}/seconds/attention"
        seconds = sum(logged.get(name, []))
        if self.model.training and seconds and logged["step_time"]:
            logged[f"{name}_share"].append(seconds / sum(logged["step_time"]))
        super().log(logs, start_time)

    def method_state(self) -> dict:
        return self.credit.state_dict() | {"generated_tokens": self.generated_tokens}

    def load_method_state(self, state: dict) -> None:
        self.generated_tokens = state.get("generated_tokens", 0)
        self.credit.load_state_dict({name: value for name, value in state.items() if name != "generated_tokens"})
