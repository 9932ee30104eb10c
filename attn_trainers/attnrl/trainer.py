"""AttnRL as a TRL trainer: the one-step off-policy pipeline around the pure parts of this package."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from datasets import IterableDataset
from torch import Tensor

from ..base.card import paper
from ..base.credit import (
    BatchCredit,
    CompletionBatch,
    CreditContext,
    CreditMethod,
    SignalPass,
    group_accuracies,
    weighted_rewards,
)
from ..base.forwards import signal_pass, timed
from ..base.trainer import BaseTrainer
from . import metrics
from .branching_report import report_branching
from .collection import CollectionMixin
from .config import AttnRLConfig
from .exploration import BranchPoints, choose_branch_points, choose_expanded, filter_easy_prompts
from .packed import PackingMixin
from .pipeline import Pipeline
from .rollouts import PromptRollouts
from .rows import (
    LeafValues,
    TrainingRow,
    arrange_rows,
    collate,
    fit_capacity,
    importance_sampling_ratio,
    prompt_rows,
    row_facts,
)
from .steps import StepDelimiters


logger = logging.getLogger(__name__)


class AttnRLTrainer(CollectionMixin, PackingMixin, BaseTrainer):
    """
    Trainer for AttnRL, process-supervised reinforcement learning that branches rollouts where attention points.

    [Attention as a Compass](https://huggingface.co/papers/2509.26628) branches each rollout at the steps that later
    steps attend to most, spends samples where prompts are hard, and trains on tree advantages. A training step m makes
    one generation call with the policy π_{m-1}: the continuations of prompt batch m together with the initial rollouts
    of batch m+1. One no-grad forward over the initial rollouts gives their old log-probs and their attention signal.

    Evaluation is plain GRPO generation.

    Args:
        model, reward_funcs, args, more, kwargs: as for [`~trl.GRPOTrainer`]; `args` is an [`AttnRLConfig`]. Tools,
            environments, `rollout_func` and iterable data sets are not supported.
        credit: a credit method that weighs the tree advantages per token, e.g. [`RhythmCredit`]; `None` for none.

    Attributes:
        pipeline: what outlives a training step.
        last_prompts: all prompts of the latest training batch, for reports.
        last_credit: what the credit method answered for it.

    Raises:
        ValueError: for settings that the pipeline cannot honour, naming field, value and fix.
    """

    _tag_names = ["trl", "attnrl"]
    _name = "AttnRL"
    _paper = paper(
        "Attention as a Compass: Efficient Exploration for Process-Supervised RL in Reasoning Models",
        "2509.26628",
        "liu2025attention",
        2025,
        "Runze Liu and Jiakang Wang and Yuling Shi and Zhihui Xie and Chenxin An and Kaiyan Zhang and Jian "
        "Zhao and Xiaodong Gu and Lei Lin and Wenping Hu and Xiu Li and Fuzheng Zhang and Guorui Zhou and Kun "
        "Gai",
    )

    config_class = AttnRLConfig
    metric_prefix = "attnrl"

    def __init__(self, model, reward_funcs=None, args=None, *more, credit: CreditMethod | None = None, **kwargs):
        if isinstance(more[0] if more else kwargs.get("train_dataset"), IterableDataset):
            raise ValueError(
                "train_dataset is an IterableDataset; AttnRL draws prompts by index, as many as each step needs. "
                "Pass a Dataset."
            )
        if credit is not None:
            credit.check_trees()
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.credit = credit
        if credit is not None:
            self._tag_names = [*self._tag_names, credit.prefix]
            credit.setup(self.model, self._tokenizer, self.reward_func_names, self.args.seed)
        self.delimiters = StepDelimiters.from_tokenizer(
            self._tokenizer, self.args.end_of_thinking, self.args.step_mode
        )
        self.pipeline = Pipeline(self.args, len(self.train_dataset))
        self.last_prompts: list[PromptRollouts] = []
        self.last_credit = BatchCredit()
        self._ahead: list[PromptRollouts] | None = None  # this rank's part of the batch that was sampled ahead
        self._loss_logps: Tensor | None = None

    # ---- the training step ------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._next_training_batch()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _next_training_batch(self) -> list[dict[str, Tensor]]:
        """Sample, score and arrange one generation batch; one micro-batch per entry."""
        pipeline = self.pipeline
        if self._ahead is None:
            self._ahead = self._sample([], pipeline.first_batch())
        prompts, num_drawn = self._ahead, pipeline.in_flight[1]
        plan = self._choose_branches(prompts)
        ends = self.state.global_step + self.args.updates_per_batch >= self.state.max_steps
        if self.args.off_policy and not ends:
            self._ahead = self._sample(plan, pipeline.draw_batch())
        else:
            pipeline.in_flight = self._ahead = None
            self._sample(plan, [])
        micro_batches = self._training_micro_batches(self._gather_prompts(prompts), num_drawn)
        pipeline.batches_trained += 1
        return micro_batches

    # ---- exploration ------------------------------------------------------------------------------------------------

    def _choose_branches(
        self, prompts: Sequence[PromptRollouts]
    ) -> list[tuple[PromptRollouts, dict[int, BranchPoints]]]:
        """Filter easy prompts; branch points of each rollout that is expanded, by prompt and index."""
        args = self.args
        if args.num_branch_points == 0:
            return []
        if args.filter_easy_prompts:
            self._filter_easy(prompts)
        if self.pipeline.batches_trained == 0 and args.branching == "attention":
            self._report_branching(prompts)
        plan = []
        for prompt in prompts:
            if prompt.filtered:
                continue
            rng = random.Random(f"{args.seed}/{prompt.draw.serial}/explore")
            points = {}
            for index in choose_expanded(prompt.correct(args.success_threshold), args.expansion, rng):
                rollout = prompt.rollouts[index]
                points[index] = choose_branch_points(
                    args.branching,
                    step_ranges=rollout.step_ranges,
                    influence=rollout.influence,
                    entropies=rollout.entropies,
                    num_points=args.num_branch_points,
                    top_fraction=args.branch_top_fraction,
                    min_spacing=args.min_branch_spacing,
                    rng=rng,
                )
            plan.append((prompt, points))
        return plan

    def _report_branching(self, prompts: Sequence[PromptRollouts]) -> None:
        """Say of the first batch what attention has to choose from, and which setting would help."""
        rollouts = [rollout for prompt in prompts for rollout in prompt.rollouts]
        if self.ranks.is_first and rollouts:
            steps, influences = [r.step_ranges for r in rollouts], [r.influence for r in rollouts]
            logger.info(str(report_branching(steps, influences, **self.args.branching_options())))

    def _filter_easy(self, prompts: Sequence[PromptRollouts]) -> None:
        """Mark easy prompts, by a running mean over the solved prompts of all ranks in the order of their draws."""
        local = []
        for prompt in prompts:
            correct = prompt.correct(self.args.success_threshold)
            local.append((prompt.draw.serial, sum(correct) / len(correct), prompt.mean_influence()))
        everywhere = sorted(self.ranks.gather_list(local))
        _, accuracies, influences = zip(*everywhere, strict=True)
        kept = filter_easy_prompts(accuracies, influences, self.pipeline.easy_influence)
        filtered = {serial for (serial, _, _), keep in zip(everywhere, kept, strict=True) if not keep}
        for prompt in prompts:
            prompt.filtered = prompt.draw.serial in filtered

    # ---- from trees to micro-batches --------------------------------------------------------------------------------

    def _gather_prompts(self, prompts: Sequence[PromptRollouts]) -> list[PromptRollouts]:
        """The prompts of all ranks, in the order of their draws."""
        everywhere = self.ranks.gather_list([replace(prompt, example={}) for prompt in prompts])
        return sorted(everywhere, key=lambda prompt: prompt.draw.serial)

    def _training_micro_batches(self, prompts: list[PromptRollouts], num_drawn: int) -> list[dict[str, Tensor]]:
        args, pipeline = self.args, self.pipeline
        include_unexpanded = args.train_unexpanded or args.num_branch_points == 0
        values_of = self._leaf_values(prompts)
        rows_of = [prompt_rows(p, include_unexpanded, v) for p, v in zip(prompts, values_of, strict=True)]
        pipeline.controller.update(num_drawn, sum(map(len, rows_of)))
        trained = fit_capacity([len(rows) for rows in rows_of], args.generation_batch_size)
        rows = [row for index in trained for row in rows_of[index]]
        self.last_prompts = prompts
        counts = torch.tensor(list(pipeline.counters.values()), device=self.ranks.device)
        pipeline.totals = dict(zip(pipeline.counters, self.ranks.sum(counts).tolist(), strict=True))
        self._log_batch(prompts, rows_of, trained, num_drawn)
        arranged = arrange_rows(
            rows,
            args.steps_per_generation,
            self.ranks.count,
            args.per_device_train_batch_size,
            seed=f"{args.seed}/{pipeline.batches_trained}/arrange",
        )
        counted = [row for row in rows if not self._is_masked(row)]
        num_tokens = torch.tensor(sum(len(row.completion_ids) for row in counted), device=self.ranks.device)
        with self.timed("old_logps"):
            parts = [self._complete_micro_batch(micro_batch, num_tokens) for micro_batch in arranged]
        if self.credit is not None:
            self._assign_credit(parts, [row_facts(micro_batch[self.ranks.index]) for micro_batch in arranged])
        return [batch for batch, _ in parts]

    def _log_batch(self, prompts, rows_of, trained, num_drawn: int) -> None:
        capacity, threshold = self.args.generation_batch_size, self.args.success_threshold
        values = metrics.batch_metrics(prompts, rows_of, trained, num_drawn, capacity, threshold)
        self.log_values(values | metrics.pipeline_metrics(self.pipeline, prompts), self.metric_prefix)
        self.log_values(metrics.completion_metrics(prompts, self._ends))
        self.log_values({"num_tokens": float(self.pipeline.totals["generated_tokens"])})

    @property
    def _ends(self) -> set[int]:
        """Tokens that end a completion."""
        return {*self.eos_token_ids, self._tokenizer.pad_token_id}

    def _is_masked(self, row: TrainingRow | None) -> bool:
        """Whether a row is cut off and such rows are masked."""
        return self.mask_truncated_completions and row is not None and row.completion_ids[-1] not in self._ends

    def _complete_micro_batch(
        self, micro_batch: list[list[TrainingRow | None]], num_tokens: Tensor
    ) -> tuple[dict[str, Tensor], SignalPass]:
        """This rank's tensors of a micro-batch, with the log-probs that only a forward can give, and what a credit
        method saw in it."""
        rows = micro_batch[self.ranks.index]
        batch = self._to_device(collate(rows, self._tokenizer.pad_token_id))
        for i, row in enumerate(rows):
            if self._is_masked(row):
                batch["completion_mask"][i] = 0
        whole = CompletionBatch.of(batch)
        observer = timed(self.credit.observer(whole)) if self.credit is not None else None
        wants_entropies = self.credit is not None and self.credit.needs_entropies
        every_row = [row for part in micro_batch for row in part if row is not None]
        is_fresh = any(row.fresh_from < len(row.completion_ids) for row in every_row)
        entropies = None
        if is_fresh or observer is not None or wants_entropies:
            logps, entropies = self.forward_completions(whole, observer=observer, compute_entropy=wants_entropies)
            old_logps = batch["old_per_token_logps"]
            batch["old_per_token_logps"] = torch.where(batch["fresh_mask"], logps.float(), old_logps)
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self._reference_logps(whole)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            self._correct_for_sampler(batch)
        batch["num_items_in_batch"] = num_tokens
        return batch, signal_pass(whole, observer, entropies)

    def _correct_for_sampler(self, batch: dict[str, Tensor]) -> None:
        """Set the ratio that corrects the sampler-to-trainer mismatch, and log that."""
        batch["importance_sampling_ratio"] = importance_sampling_ratio(
            batch["old_per_token_logps"],
            batch["sampling_per_token_logps"],
            batch["completion_mask"],
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )
        self.log_means(metrics.sampling_totals(batch), "")
        largest = metrics.sampling_difference(batch).nan_to_num(nan=0.0).max()
        self.log_values({"sampling/sampling_logp_difference/max": self.ranks.gather(largest[None]).max().item()})

    # ---- credit -----------------------------------------------------------------------------------------------------

    def _leaf_values(self, prompts: Sequence[PromptRollouts]) -> list[LeafValues]:
        """What the leaves of each prompt are worth, shaped by the credit method over all leaves of a prompt."""
        if self.credit is None:
            return [LeafValues.plain(prompt) for prompt in prompts]
        counts = [len(prompt.leaves) for prompt in prompts]
        leaves = [leaf for prompt in prompts for leaf in prompt.leaves]
        rewards = torch.stack([torch.from_numpy(leaf.rewards) for leaf in leaves])  # (N, F)
        lengths = torch.tensor([leaf.completion_length for leaf in leaves])  # (N,)
        groups = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))  # (N,)
        weights = self.reward_weights.cpu()
        correct = self.credit.judge(rewards, weights)
        shaped = weighted_rewards(self.credit.shape_rewards(rewards, lengths, groups), weights).nan_to_num(nan=0.0)
        self.log_values(self.credit.reward_metrics(correct, lengths, groups), self.credit.prefix)
        parts = (values.split(counts) for values in (shaped, correct, group_accuracies(correct, groups)))
        return [LeafValues(r.tolist(), c.tolist(), a[0].item()) for r, c, a in zip(*parts, strict=True)]

    def _assign_credit(self, parts, facts) -> None:
        """Give each micro-batch its factors, (B, T)."""
        context = CreditContext(
            ranks=self.ranks,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            observe=lambda batch, observer: self.forward_completions(batch, observer=observer),
            folder=Path(self.args.output_dir),
        )
        passes = [signal for _, signal in parts]
        credit = self.credit.factors(passes, [batch["advantages"] for batch, _ in parts], facts, context)
        for (batch, _), factors in zip(parts, credit.factors or [], strict=bool(credit.factors)):
            batch["credit"] = factors.to(batch["advantages"].device)
        seconds = sum(signal.seconds for signal in passes)
        self.log_values(credit.values | {"seconds/attention": seconds}, self.credit.prefix)
        self.log_means(credit.totals, self.credit.prefix)
        self.last_credit = credit
        self.credit.report(credit, context)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if torch.is_grad_enabled():
            self._loss_logps = logps.detach()
        return logps, entropies, aux_loss

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "fresh_mask" in inputs and self.model.training:
            self.log_means(metrics.ratio_totals(inputs, self._loss_logps), self.metric_prefix)
        self._loss_logps = None
        return loss

    # ---- card and checkpoints ---------------------------------------------------------------------------------------

    def card_settings(self) -> dict[str, object]:
        settings = super().card_settings()
        settings |= {
            "leaf budget of a prompt": self.args.num_generations,
            "last prompt batch": self.pipeline.controller.size,
        }
        if self.credit is not None:
            settings["credit method"] = type(self.credit).__name__
            settings |= {f"{self.credit.prefix}: {name}": value for name, value in self.credit.settings().items()}
        return settings

    def method_state(self) -> dict:
        state = self.pipeline.state_dict()
        return state if self.credit is None else state | {"credit": self.credit.state_dict()}

    def load_method_state(self, state: dict) -> None:
        self.pipeline.load_state_dict(state, self.ranks.is_first)
        self._ahead = None
        if self.credit is not None and "credit" in state:
            self.credit.load_state_dict(state["credit"])
