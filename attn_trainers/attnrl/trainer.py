"""AttnRL as a TRL trainer: the one-step off-policy pipeline around the pure parts of this package."""

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from ..base.card import paper
from ..base.credit import (
    BatchCredit,
    CompletionBatch,
    CreditMethod,
    SignalPass,
)
from ..base.forwards import signal_pass, timed
from ..base.trainer import BaseTrainer
from . import metrics
from .batches import MicroBatch, Update, arrange_updates
from .branching_report import report_branching
from .collection import CollectionMixin
from .config import AttnRLConfig
from .crediting import CreditingMixin
from .exploration import BranchPoints, choose_branch_points, choose_expanded, filter_easy_prompts
from .loss import LossMixin
from .overlap import OverlapMixin
from .packed import PackingMixin
from .pipeline import Pipeline
from .reports import ReportsMixin
from .rollouts import PromptRollouts, ReadRollout
from .rows import (
    TrainingRow,
    collate,
    fit_capacity,
    importance_sampling_ratio,
    pad_rows,
    prompt_rows,
    row_facts,
)
from .steps import StepDelimiters
from .updates import UpdatesMixin
from .weights import part_weights


logger = logging.getLogger(__name__)

LINE_FIELDS = {"attnrl/influence/mean": "  influence {:.2g}", "attnrl/valid_ratio": "  mixed {:.0%}"}


class AttnRLTrainer(
    OverlapMixin, ReportsMixin, CollectionMixin, CreditingMixin, UpdatesMixin, LossMixin, PackingMixin, BaseTrainer
):
    """
    Trainer for AttnRL, process-supervised reinforcement learning that branches rollouts where attention points.

    [Attention as a Compass](https://huggingface.co/papers/2509.26628) branches each rollout at the steps that later
    steps attend to most, spends samples where prompts are hard, and trains on tree advantages. A training step m makes
    one generation call with the policy π_{m-1}: the continuations of prompt batch m together with the initial rollouts
    of batch m+1. One no-grad forward over the initial rollouts gives their old log-probs and their attention signal.

    A generation batch is as many updates as it has rows for; one without rows is none, and the next is sampled at
    once. Checkpoints and evaluations wait for the end of the generation batch in which they are due.

    Evaluation is plain GRPO generation.

    Args:
        model, reward_funcs, args, more, kwargs: as for [`~trl.GRPOTrainer`]; `args` is an [`AttnRLConfig`]. Tools,
            environments, `rollout_func` and iterable data sets are not supported.
        credit: a credit method that weighs the tree advantages per token, e.g. [`RhythmCredit`]; `None` for none.
        step_truth: for `branching="oracle"`: given a row of the data set and the texts of a rollout's steps, how much
            each step matters, 0 for not at all.

    Attributes:
        pipeline: what outlives a training step.
        exhibits: what a run shows beside numbers (`log_trees`, `log_pages`).
        keeps_prompts: set it to have `last_prompts`.
        last_prompts: all prompts of the latest training batch, for reports; empty unless `keeps_prompts` is set.
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

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        *more,
        credit: CreditMethod | None = None,
        step_truth: Callable[[dict[str, Any], list[str]], Sequence[float]] | None = None,
        **kwargs,
    ):
        if isinstance(more[0] if more else kwargs.get("train_dataset"), IterableDataset):
            raise ValueError(
                "train_dataset is an IterableDataset; AttnRL draws prompts by index, as many as each step needs. "
                "Pass a Dataset."
            )
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        for function in functions:
            if getattr(function, "needs_groups", False):
                raise ValueError(
                    f"reward_funcs has {function.__name__}, which compares the completions of whole groups; trees "
                    "have none: what is scored together is continuations of one batch and rollouts of the next. Give "
                    "a reward of each completion alone, and credit=AttnPOCredit(...) to penalise length."
                )
        if args is not None and args.reads_truth and step_truth is None:
            raise ValueError(
                f"branching={args.branching!r} needs to know which steps matter; pass the trainer step_truth=..., or "
                "set branching='attention'."
            )
        if credit is not None:
            credit.check_trees()
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self.credit, self.step_truth = credit, step_truth
        if credit is not None:
            self._tag_names = [*self._tag_names, credit.prefix]
            credit.setup(self.model, self._tokenizer, self.reward_func_names, self.args.seed)
        self.line_fields |= LINE_FIELDS | dict(credit.line_fields if credit is not None else {})
        self.delimiters = StepDelimiters.from_tokenizer(
            self._tokenizer, self.args.end_of_thinking, self.args.step_mode
        )
        self.pipeline = Pipeline(self.args, len(self.train_dataset))
        self.keeps_prompts = False
        self.last_prompts: list[PromptRollouts] = []
        self.last_credit = BatchCredit()
        self._ahead: list[PromptRollouts] | None = None  # this rank's part of the batch that was sampled ahead
        self._seconds: dict[str, float] = defaultdict(float)  # of the current generation batch
        self._latest_rewards: dict[str, float] = {}

    # ---- the generation batch ---------------------------------------------------------------------------------------

    def _next_training_batch(self) -> list[list[dict[str, Tensor]]]:
        """Updates of the next generation batch: none where it has no row, or where the run's prompts are used."""
        pipeline = self.pipeline
        if self._ahead is None:
            self._ahead = self._sample([], pipeline.first_batch())
        if pipeline.in_flight is None:
            return []
        updates = self._train_batch()
        if updates:
            pipeline.batches_trained += 1
        else:
            pipeline.empty_batches += 1
        return updates * self.num_iterations

    def _train_batch(self) -> list[list[dict[str, Tensor]]]:
        """Updates of the batch in flight, once its continuations and the next batch's initial rollouts are sampled."""
        pipeline = self.pipeline
        prompts, num_drawn = self._ahead, pipeline.in_flight[1]
        pipeline.land()
        plan = self._choose_branches(prompts)
        draws = []
        if self.args.off_policy and not self._may_end(prompts, plan):
            draws = pipeline.draw_batch()
        else:
            pipeline.in_flight = None
        if draws and self.overlaps_sampling:
            self._sample_beside_training(plan, draws)
        else:
            ahead = self._sample(plan, draws)
            self._ahead = ahead if draws else None
        updates = self._training_micro_batches(self._gather_prompts(prompts), num_drawn)
        if not updates:
            self._land_ahead()
        self.log_values({f"seconds/{name}": value for name, value in self._seconds.items()}, self.metric_prefix)
        self._seconds.clear()
        return updates

    def _before_weights_change(self) -> None:
        self._land_ahead()

    def _may_end(self, prompts: Sequence[PromptRollouts], plan: Sequence) -> bool:
        """Whether the run may end with this batch, which then samples nothing ahead."""
        leaves = sum(len(points.offsets) for _, of_prompt in plan for points in of_prompt.values())
        leaves = self.args.rollouts_per_branch * leaves + sum(len(prompt.rollouts) for prompt in prompts)
        most = min(
            int(self.ranks.sum(torch.tensor(leaves, device=self.ranks.device))), self.args.generation_batch_size
        )
        updates = -(-most // self.args.rows_per_update) * self.num_iterations
        return self.state.global_step + updates >= self.state.max_steps

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled for the generation batches so far, on all ranks; what is in flight counts with its batch."""
        return self.pipeline.totals["generated_tokens"]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the context to those of its name in this generation batch."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

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
                    truth=self._truth_of(prompt, rollout) if args.reads_truth else None,
                    num_points=args.num_branch_points,
                    top_fraction=args.branch_top_fraction,
                    min_spacing=args.min_branch_spacing,
                    rng=rng,
                )
            plan.append((prompt, points))
        return plan

    def _truth_of(self, prompt: PromptRollouts, rollout: ReadRollout) -> Sequence[float]:
        texts = [self._tokenizer.decode(rollout.tokens[start:end].tolist()) for start, end in rollout.step_ranges]
        return self.step_truth(prompt.example, texts)

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
        if not everywhere:
            return
        _, accuracies, influences = zip(*everywhere, strict=True)
        kept = filter_easy_prompts(accuracies, influences, self.pipeline.easy_influence)
        filtered = {serial for (serial, _, _), keep in zip(everywhere, kept, strict=True) if not keep}
        for prompt in prompts:
            prompt.filtered = prompt.draw.serial in filtered

    # ---- from trees to micro-batches --------------------------------------------------------------------------------

    def _gather_prompts(self, prompts: Sequence[PromptRollouts]) -> list[PromptRollouts]:
        """Prompts of all ranks, in the order of their draws; of their examples what reports show."""
        local = [replace(prompt, example={"prompt": prompt.example["prompt"]}) for prompt in prompts]
        return sorted(self.ranks.gather_list(local), key=lambda prompt: prompt.draw.serial)

    def _training_micro_batches(self, prompts: list[PromptRollouts], num_drawn: int) -> list[list[dict[str, Tensor]]]:
        """This rank's micro-batches of each update."""
        args, pipeline = self.args, self.pipeline
        include_unexpanded = args.train_unexpanded or args.num_branch_points == 0
        values_of = self._leaf_values(prompts)
        rows_of = [prompt_rows(p, include_unexpanded, v) for p, v in zip(prompts, values_of, strict=True)]
        pipeline.controller.update(num_drawn, sum(map(len, rows_of)))
        trained = fit_capacity([len(rows) for rows in rows_of], args.generation_batch_size)
        rows = [row for index in trained for row in rows_of[index]]
        if self.keeps_prompts:
            self.last_prompts = prompts
        self._offer_trees(prompts)
        updates = arrange_updates(
            rows,
            rows_per_update=args.rows_per_update,
            num_ranks=self.ranks.count,
            rows_per_rank=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_micro_batch,
            seed=f"{args.seed}/{pipeline.batches_trained}/arrange",
        )
        self._log_batch(prompts, rows_of, trained, num_drawn, updates)
        with self.timed("old_logps"):
            micro_batches = [micro_batch for update in updates for micro_batch in update]
            parts = [self._complete_micro_batch(part) for part in self.progress(micro_batches, "Old log-probs")]
        facts = [row_facts(part[self.ranks.index] or [None]) for part in micro_batches]
        credit = self._assign_credit(parts, facts) if self.credit is not None and parts else BatchCredit()
        self.offer_page(
            self.credit, credit, [signal for _, signal in parts], [batch["advantages"] for batch, _ in parts]
        )
        if self.log_completions:
            self._log_completions(prompts, values_of, self._mean_factors(parts, facts, credit))
        batches = iter([batch for batch, _ in parts])
        return [self._weighted([next(batches) for _ in update], update) for update in updates]

    def _log_batch(self, prompts, rows_of, trained, num_drawn: int, updates: Sequence[Update]) -> None:
        pipeline = self.pipeline
        counts = torch.tensor(list(pipeline.counters.values()), device=self.ranks.device)
        pipeline.set_totals(self.ranks.sum(counts).tolist())
        self.state.num_input_tokens_seen = pipeline.totals["generated_tokens"] + pipeline.totals["context_tokens"]
        values = metrics.batch_metrics(prompts, rows_of, trained, num_drawn, self.args.success_threshold)
        values |= metrics.update_metrics(updates) | metrics.pipeline_metrics(pipeline, prompts)
        self.log_values(values, self.metric_prefix)
        self.log_values(metrics.completion_metrics(prompts, self._ends))
        self.log_values({"num_tokens": float(self.state.num_input_tokens_seen)})

    @property
    def _ends(self) -> set[int]:
        """Tokens that end a completion."""
        return {*self.eos_token_ids, self._tokenizer.pad_token_id}

    def _is_masked(self, row: TrainingRow | None) -> bool:
        """Whether a row is cut off and such rows are masked."""
        return self.mask_truncated_completions and row is not None and row.completion_ids[-1] not in self._ends

    def _complete_micro_batch(self, micro_batch: MicroBatch) -> tuple[dict[str, Tensor], SignalPass]:
        """This rank's tensors of a micro-batch, with the log-probs that only a forward can give, and what a credit
        method saw in it. A rank without rows forwards one token."""
        rows = micro_batch[self.ranks.index] or [None]
        batch = self._to_device(collate(rows, self._tokenizer.pad_token_id))
        for i, row in enumerate(rows):
            if self._is_masked(row):
                batch["completion_mask"][i] = 0
        whole = CompletionBatch.of(batch)
        observer = timed(self.credit.observer(whole)) if self.credit is not None else None
        wants_entropies = self.credit is not None and self.credit.needs_entropies
        every_row = [row for part in micro_batch for row in part]
        is_fresh = any(row.fresh_from < len(row.completion_ids) for row in every_row)
        entropies = None
        if is_fresh or observer is not None or wants_entropies:
            logps, entropies = self.forward_completions(
                whole, observer=observer, compute_entropy=wants_entropies, batch_size=len(rows)
            )
            old_logps = batch["old_per_token_logps"]
            batch["old_per_token_logps"] = torch.where(batch["fresh_mask"], logps.float(), old_logps)
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self._reference_logps(whole)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            self._correct_for_sampler(batch)
        if not self.use_vllm:
            del batch["sampling_per_token_logps"]  # there are none: off-policy masking takes the trainer's own
        return batch, signal_pass(whole, observer, entropies)

    def _weighted(self, batches: list[dict[str, Tensor]], update: Update) -> list[dict]:
        """Give this rank's micro-batches of an update their weights in its loss, and as many rows as on each rank."""
        weights = part_weights(
            update,
            self.ranks.index,
            self.loss_type,
            self.args.steps_per_generation,
            lambda row: 0 if self._is_masked(row) else len(row.completion_ids),
        )
        weighted = []
        for batch, weight in zip(batches, weights, strict=True):
            num_items = torch.tensor(weight.num_items, device=self.ranks.device)
            weighted.append(pad_rows(batch, weight.num_rows) | {"num_items_in_batch": num_items, "weight": weight})
        return weighted

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

    # ---- logs, card and checkpoints ---------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """Every entry of the training log has the rewards of its latest generation batch."""
        if self.model.training:
            logged = self._metrics["train"]
            for name, value in self._latest_rewards.items():
                logged.setdefault(name, [value])
            self._latest_rewards = {name: values[-1] for name, values in logged.items() if name.startswith("reward")}
        super().log(logs, start_time)

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
        self._ahead = self._flying = None
        self._updates.clear()
        if self.credit is not None and "credit" in state:
            self.credit.load_state_dict(state["credit"])
