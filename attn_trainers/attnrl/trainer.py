"""AttnRL as a TRL trainer: the one-step off-policy pipeline around the pure parts of this package."""

import random
import textwrap
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from ..base.checkpoints import read_state, write_state
from ..base.generation import GenerationRequest, count_missing_logps
from ..base.trainer import BaseTrainer
from . import metrics
from .config import AttnRLConfig
from .exploration import PromptBatchController, RunningMean, choose_branch_points, choose_expanded, filter_easy_prompts
from .forwards import ForwardMixin
from .rollouts import Continuation, Draw, PromptRollouts, PromptStream, Rollout, to_array
from .rows import TrainingRow, arrange_rows, collate, fit_capacity, importance_sampling_ratio, prompt_rows
from .steps import StepDelimiters


class AttnRLTrainer(ForwardMixin, BaseTrainer):
    """
    Trainer for AttnRL, process-supervised reinforcement learning that branches rollouts where attention points.

    [Attention as a Compass](https://huggingface.co/papers/2509.26628) branches each rollout at the steps that later
    steps attend to most, spends samples where prompts are hard, and trains on tree advantages. A training step m makes
    one generation call with the policy π_{m-1}: the continuations of prompt batch m together with the initial rollouts
    of batch m+1. One no-grad forward over the initial rollouts gives their old log-probs and their attention signal.

    Evaluation is plain GRPO generation.

    Args:
        model, reward_funcs, args, kwargs: as for [`~trl.GRPOTrainer`]; `args` is an [`AttnRLConfig`]. Tools,
            environments, `rollout_func` and iterable data sets are not supported.

    Raises:
        ValueError: for settings that the pipeline cannot honour, naming field, value and fix.
    """

    _tag_names = ["trl", "attnrl"]
    _name = "AttnRL"
    _paper = {
        "title": "Attention as a Compass: Efficient Exploration for Process-Supervised RL in Reasoning Models",
        "id": "2509.26628",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{liu2025attention,
                title        = {{Attention as a Compass: Efficient Exploration for Process-Supervised RL in
                                 Reasoning Models}},
                author       = {Runze Liu and Jiakang Wang and Yuling Shi and Zhihui Xie and Chenxin An and
                                Kaiyan Zhang and Jian Zhao and Xiaodong Gu and Lei Lin and Wenping Hu and Xiu Li
                                and Fuzheng Zhang and Guorui Zhou and Kun Gai},
                year         = 2025,
                eprint       = {arXiv:2509.26628},
            }"""),
    }

    def __init__(self, model, reward_funcs, args=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = AttnRLConfig(f"{model_name.split('/')[-1]}-AttnRL")
        for name in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(name):
                raise ValueError(f"{name} is set, but AttnRL branches single-turn completions; leave {name} unset.")
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            raise ValueError(
                "train_dataset is an IterableDataset; AttnRL draws prompts by index, as many as each step needs. "
                "Pass a Dataset."
            )
        super().__init__(model, reward_funcs, args=args, **kwargs)
        self.delimiters = StepDelimiters.from_tokenizer(self._tokenizer, args.end_of_thinking)
        self.stream = PromptStream(len(self.train_dataset), args.seed, shuffle=args.shuffle_dataset is not False)
        prompt_batch = args.generation_batch_size // args.num_generations
        self.controller = PromptBatchController(
            args.generation_batch_size,
            prompt_batch,
            smoothing=args.prompt_batch_smoothing,
            rounding=args.prompt_batch_rounding,
            max_size=round(prompt_batch * args.max_prompt_batch_factor),
        )
        self.easy_influence = RunningMean()
        self.batches_trained = 0  # index of the current policy: training batches behind it
        self.counters = dict.fromkeys(metrics.COUNTERS, 0)  # of this rank
        self.counter_totals = dict(self.counters)  # of all ranks, as of the latest training batch
        self._in_flight: tuple[int, int] | None = None  # first draw and number of draws of the batch sampled ahead
        self._pending: list[PromptRollouts] | None = None  # this rank's part of it
        self._loss_logps: Tensor | None = None
        self.last_prompts: list[PromptRollouts] = []  # all prompts of the latest training batch, for reports

    # ---- the training step ------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._next_training_batch()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _next_training_batch(self) -> list[dict[str, Tensor]]:
        """Sample, score and arrange one generation batch; one micro-batch per entry."""
        if self._pending is None:
            self._pending = self._sample([], self._first_draws())
        prompts, drawn = self._pending, self._in_flight
        self._choose_branches(prompts)
        ends = self.state.global_step + self.args.updates_per_batch >= self.state.max_steps
        if self.args.off_policy and not ends:
            self._in_flight = (self.stream.next_serial, self.controller.size)
            next_draws = self.stream.draw(self.controller.size)
        else:
            self._in_flight, next_draws = None, []
        sampled_ahead = self._sample(prompts, next_draws)
        self._pending = sampled_ahead if next_draws else None
        micro_batches = self._training_micro_batches(self._gather_prompts(prompts), drawn[1])
        self.batches_trained += 1
        return micro_batches

    def _first_draws(self) -> list[Draw]:
        """Prompts of a batch that is not sampled yet: on resume those that were in flight."""
        if self._in_flight is None:
            self._in_flight = (self.stream.next_serial, self.controller.size)
            return self.stream.draw(self.controller.size)
        return self.stream.draws(*self._in_flight)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _sample(self, branched: Sequence[PromptRollouts], draws: Sequence[Draw]) -> list[PromptRollouts]:
        """One generation call: the continuations of `branched` and the initial rollouts of this rank's part of
        `draws`.

        Both are scored in one call too; then the attention signal and the old log-probs of the new rollouts are taken,
        with the weights that sampled them.
        """
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        new = self._tokenize_draws(draws[rank::num_ranks])
        slots = [(r, offset) for p in branched for r in p.rollouts for offset in self._branch_offsets(r)]
        requests = self._continuation_requests(branched) + self._initial_requests(new)
        with self._timed("generate"):
            sampled = self.generate_requests(requests)
        self.counters["samples"] += len(sampled)
        self.counters["generated_tokens"] += sum(len(s.token_ids) for s in sampled)
        self.counters["missing_sampling_logps"] += count_missing_logps(sampled)
        for (rollout, offset), s in zip(slots, sampled[: len(slots)], strict=True):
            rollout.branches.append(Continuation(offset, s.token_ids, to_array(s.logps), self.batches_trained))
        for i, prompt in enumerate(new):
            first = len(slots) + i * self.args.num_rollouts
            prompt.rollouts = [
                Rollout(s.token_ids, to_array(s.logps), self.batches_trained)
                for s in sampled[first : first + self.args.num_rollouts]
            ]
        with self._timed("reward"):
            self._score_completions(branched, new)
        if draws:
            with self._timed("attention"):
                self._read_rollouts(new)
        return new

    def _tokenize_draws(self, draws: Sequence[Draw]) -> list[PromptRollouts]:
        examples = [self.train_dataset[draw.index] for draw in draws]
        if not examples:
            return []
        prompt_ids, _, _ = self._tokenize_prompts([example["prompt"] for example in examples])
        return [
            PromptRollouts(draw, example, list(ids), [])
            for draw, example, ids in zip(draws, examples, prompt_ids, strict=True)
        ]

    def _branch_offsets(self, rollout: Rollout) -> list[int]:
        """Offsets of the continuations to sample, each as often as it is rolled out."""
        offsets = rollout.branch_points.offsets if rollout.branch_points else []
        return [offset for offset in offsets for _ in range(self.args.rollouts_per_branch)]

    def _request(self, prompt: PromptRollouts, prefix: list[int], sample: str) -> GenerationRequest:
        seed = None
        if self.args.seeded_sampling:
            seed = random.Random(f"{self.args.seed}/{prompt.draw.serial}/{sample}").getrandbits(31)
        return GenerationRequest(prompt.prompt_ids + prefix, self.max_completion_length - len(prefix), seed)

    def _initial_requests(self, prompts: Sequence[PromptRollouts]) -> list[GenerationRequest]:
        return [self._request(p, [], f"initial/{i}") for p in prompts for i in range(self.args.num_rollouts)]

    def _continuation_requests(self, prompts: Sequence[PromptRollouts]) -> list[GenerationRequest]:
        return [
            self._request(p, r.tokens[:offset], f"branch/{i}/{j}")
            for p in prompts
            for i, r in enumerate(p.rollouts)
            for j, offset in enumerate(self._branch_offsets(r))
        ]

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def _score_completions(self, branched: Sequence[PromptRollouts], new: Sequence[PromptRollouts]) -> None:
        """Reward every continuation of `branched` and every rollout of `new` by TRL's own plumbing, in one call.

        TRL gathers the rewards, so ranks with fewer completions add some of their own that nobody reads.
        """
        scored = [(p, c, r.tokens[: c.offset] + c.tokens) for p in branched for r in p.rollouts for c in r.branches]
        scored += [(p, r, r.tokens) for p in new for r in p.rollouts]
        counts = self.accelerator.gather(torch.tensor([len(scored)], device=self.accelerator.device))  # (ranks,)
        count = int(counts.max())
        if count == 0:
            return
        idle = (self.train_dataset[0], [self._tokenizer.eos_token_id])
        items = [(p.example, tokens) for p, _, tokens in scored] + [idle] * (count - len(scored))
        examples = [example for example, _ in items]
        completion_ids = [tokens for _, tokens in items]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        conversational = isinstance(examples[0]["prompt"], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        prompts = [example["prompt"] for example in examples]
        rewards_per_func = self._calculate_rewards(examples, prompts, completions, completion_ids)  # (ranks·n, F)
        idle_rows = torch.arange(count, device=counts.device).expand(len(counts), -1) >= counts[:, None]  # (ranks, n)
        rewards_per_func[idle_rows.flatten()] = torch.nan
        first = self.accelerator.process_index * count
        local = rewards_per_func[first : first + len(scored)]
        self.counters["unscorable"] += int(torch.isnan(local).all(dim=1).sum())
        rewards = (local * self.reward_weights.to(local.device)).nansum(dim=1).tolist()  # (n,)
        for (_, sample, _), reward in zip(scored, rewards, strict=True):
            sample.reward = reward
        metrics.log_completions(self, prompts, completions, rewards_per_func)

    # ---- exploration ------------------------------------------------------------------------------------------------

    def _choose_branches(self, prompts: Sequence[PromptRollouts]) -> None:
        """Filter easy prompts and set the branch points of the rollouts that are expanded."""
        args = self.args
        if args.num_branch_points == 0:
            return
        if args.filter_easy_prompts:
            self._filter_easy(prompts)
        for prompt in prompts:
            if prompt.filtered:
                continue
            rng = random.Random(f"{args.seed}/{prompt.draw.serial}/explore")
            for index in choose_expanded(prompt.correct(args.success_threshold), args.expansion, rng):
                rollout = prompt.rollouts[index]
                rollout.branch_points = choose_branch_points(
                    args.branching,
                    step_ranges=rollout.step_ranges,
                    influence=rollout.influence,
                    entropies=rollout.entropies,
                    num_points=args.num_branch_points,
                    top_fraction=args.branch_top_fraction,
                    min_spacing=args.min_branch_spacing,
                    rng=rng,
                )

    def _filter_easy(self, prompts: Sequence[PromptRollouts]) -> None:
        """Mark easy prompts, by a running mean over the solved prompts of all ranks in the order of their draws."""
        threshold = self.args.success_threshold
        local = []
        for prompt in prompts:
            correct = prompt.correct(threshold)
            local.append((prompt.draw.serial, sum(correct) / len(correct), prompt.mean_influence()))
        everywhere = sorted(gather_object(local))
        kept = filter_easy_prompts(
            [accuracy for _, accuracy, _ in everywhere], [y for _, _, y in everywhere], self.easy_influence
        )
        filtered = {serial for (serial, _, _), keep in zip(everywhere, kept, strict=True) if not keep}
        for prompt in prompts:
            prompt.filtered = prompt.draw.serial in filtered

    # ---- from trees to micro-batches --------------------------------------------------------------------------------

    def _gather_prompts(self, prompts: Sequence[PromptRollouts]) -> list[PromptRollouts]:
        """The prompts of all ranks, in the order of their draws."""
        everywhere = gather_object([replace(prompt, example={}) for prompt in prompts])
        return sorted(everywhere, key=lambda prompt: prompt.draw.serial)

    def _training_micro_batches(self, prompts: list[PromptRollouts], num_drawn: int) -> list[dict[str, Tensor]]:
        args = self.args
        rows_of = [prompt_rows(p, args.train_unexpanded or args.num_branch_points == 0) for p in prompts]
        num_rows = sum(map(len, rows_of))
        self.controller.update(num_drawn, num_rows)
        trained = fit_capacity([len(rows) for rows in rows_of], args.generation_batch_size)
        rows = [row for index in trained for row in rows_of[index]]
        self.last_prompts = prompts
        counts = torch.tensor([list(self.counters.values())], device=self.accelerator.device)
        totals = self.accelerator.gather(counts).sum(dim=0).tolist()
        self.counter_totals = dict(zip(self.counters, totals, strict=True))
        self._log_metrics(metrics.batch_metrics(self, prompts, rows_of, trained, num_drawn))
        arranged = arrange_rows(
            rows,
            args.steps_per_generation,
            self.accelerator.num_processes,
            args.per_device_train_batch_size,
            seed=f"{args.seed}/{self.batches_trained}/arrange",
        )
        if self.mask_truncated_completions:
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            rows = [row for row in rows if row.completion_ids[-1] in ends]
        num_tokens = torch.tensor(sum(len(row.completion_ids) for row in rows), device=self.accelerator.device)
        with self._timed("old_logps"):
            return [self._complete_micro_batch(micro_batch, num_tokens) for micro_batch in arranged]

    def _complete_micro_batch(self, micro_batch: list[list[TrainingRow | None]], num_tokens: Tensor) -> dict:
        """This rank's tensors of a micro-batch, with the log-probs that only a forward can give."""
        rows = micro_batch[self.accelerator.process_index]
        batch = self._to_device(collate(rows, self._tokenizer.pad_token_id))
        fresh = batch["fresh_mask"]
        if any(row is not None and row.fresh_from < len(row.completion_ids) for part in micro_batch for row in part):
            logps, _ = self._forward_logps(batch)
            batch["old_per_token_logps"] = torch.where(fresh, logps.float(), batch["old_per_token_logps"])
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self._reference_logps(batch)
        if self.mask_truncated_completions:
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            for i, row in enumerate(rows):
                if row is not None and row.completion_ids[-1] not in ends:
                    batch["completion_mask"][i] = 0
        if self.use_vllm and self.vllm_importance_sampling_correction:
            batch["importance_sampling_ratio"] = importance_sampling_ratio(
                batch["old_per_token_logps"],
                batch["sampling_per_token_logps"],
                batch["completion_mask"],
                self.vllm_importance_sampling_mode,
                self.vllm_importance_sampling_clip_min,
                self.vllm_importance_sampling_clip_max,
            )
            self._log_metrics(metrics.sampling_metrics(self, batch))
        batch["num_items_in_batch"] = num_tokens
        return batch

    # ---- loss and metrics -------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if torch.is_grad_enabled():
            self._loss_logps = logps.detach()
        return logps, entropies, aux_loss

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "fresh_mask" in inputs and self.model.training:
            self._log_metrics(metrics.ratio_metrics(self, inputs, self._loss_logps))
        self._loss_logps = None
        return loss

    def _log_metrics(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    @contextmanager
    def _timed(self, name: str):
        start = time.perf_counter()
        yield
        self._metrics["train"][f"attnrl/seconds/{name}"].append(time.perf_counter() - start)

    def card_settings(self) -> dict[str, object]:
        settings = super().card_settings()
        settings |= {"leaf budget of a prompt": self.args.num_generations, "last prompt batch": self.controller.size}
        return settings

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def pipeline_state(self) -> dict:
        """What outlives a step, as JSON types. Rollouts in flight are not kept: a resumed run samples them again."""
        return {
            "batches_trained": self.batches_trained,
            "next_serial": self.stream.next_serial,
            "in_flight": self._in_flight,
            "easy_influence": self.easy_influence.state_dict(),
            "controller": self.controller.state_dict(),
            "counters": self.counter_totals,
        }

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            write_state(folder, "attnrl", self.pipeline_state())

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        state = read_state(checkpoint, "attnrl") if checkpoint is not None else None
        if state is None:
            return
        self.batches_trained = state["batches_trained"]
        self.stream.next_serial = state["next_serial"]
        self._in_flight = tuple(state["in_flight"]) if state["in_flight"] else None
        self.easy_influence.load_state_dict(state["easy_influence"])
        self.controller.load_state_dict(state["controller"])
        self.counter_totals = state["counters"]
        if self.accelerator.is_main_process:
            self.counters.update(state["counters"])
        self._pending = None
