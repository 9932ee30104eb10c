"""How AttnRL comes by rollouts: one generation call, one scoring, one no-grad forward over what is new."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.chat_template_utils import parse_response
from trl.trainer.utils import use_adapter

from ..attention import InfluenceObserver
from ..base.credit import CompletionBatch, weighted_rewards
from ..sampling.requests import GeneratedTokens, GenerationRequest, count_missing_logps
from .exploration import BranchPoints
from .pipeline import Draw
from .rollouts import BranchedRollout, Continuation, PromptRollouts, ReadRollout, Rollout, to_array, to_tokens
from .rows import TrainingRow, collate
from .steps import segment_steps


# Branch points of the rollouts that are expanded, by prompt and by index of the rollout.
BranchPlan = Sequence[tuple[PromptRollouts, dict[int, BranchPoints]]]


class CollectionMixin:
    """Sampling, scoring and reading of rollouts, for `AttnRLTrainer`; as many collectives on every rank."""

    def _sample(self, plan: BranchPlan, draws: Sequence[Draw]) -> list[PromptRollouts]:
        """One generation call: the continuations of `plan` and the initial rollouts of this rank's part of `draws`.

        Both are scored in one call too; then the attention signal and the old log-probs of the new rollouts are taken,
        with the weights that sampled them. The prompts of the plan get their branched rollouts.

        Returns:
            The new prompts of this rank.
        """
        new = self._tokenize_draws(draws[self.ranks.index :: self.ranks.count])
        slots = self._all_slots(plan)
        requests = [*self._continuation_requests(plan), *self._initial_requests(new)]
        with self.timed("generate"):
            sampled = self.generate_requests(requests)
        first = len(slots)
        completions = self._whole_continuations(slots, sampled[:first]) + self._whole_rollouts(new, sampled[first:])
        with self.timed("reward"):
            rewards, extras = self._score(completions)
        self._count(self.pipeline.counters, requests[:first], sampled[:first], rewards[:first])
        self._count(self.pipeline.ahead, requests[first:], sampled[first:], rewards[first:])
        samples = self._samples(sampled, rewards, extras, self.pipeline.batches_trained)
        self._attach_continuations(plan, slots, samples[:first])
        return self._attach_rollouts(new, samples[first:], reads=bool(draws))

    def _all_slots(self, plan: BranchPlan) -> list[tuple[PromptRollouts, int, int]]:
        return [(p, i, offset) for p, points in plan for i, offset in self._slots(points)]

    @staticmethod
    def _whole_continuations(slots: Sequence, sampled: Sequence[GeneratedTokens]) -> list:
        return [
            (p, np.concatenate([p.rollouts[i].tokens[:offset], to_tokens(s.token_ids)]))
            for (p, i, offset), s in zip(slots, sampled, strict=True)
        ]

    def _whole_rollouts(self, prompts: Sequence[PromptRollouts], sampled: Sequence[GeneratedTokens]) -> list:
        owners = [p for p in prompts for _ in range(self.args.num_rollouts)]
        return [(p, to_tokens(s.token_ids)) for p, s in zip(owners, sampled, strict=True)]

    def _attach_continuations(self, plan: BranchPlan, slots: Sequence, samples: Sequence[dict | None]) -> None:
        """Give the expanded rollouts of the plan their continuations, those left out that have no value."""
        continuations = {(id(p), i): [] for p, points in plan for i in points}
        for (p, i, offset), sample in zip(slots, samples, strict=True):
            if sample is not None:
                continuations[id(p), i].append(Continuation(offset=offset, **sample))
        for p, points in plan:
            for i, point in points.items():
                branches = continuations[id(p), i]
                p.rollouts[i] = BranchedRollout.at_next_stage(p.rollouts[i], branch_points=point, branches=branches)

    def _attach_rollouts(
        self, prompts: Sequence[PromptRollouts], samples: Sequence[dict | None], reads: bool
    ) -> list[PromptRollouts]:
        """Give new prompts their rollouts, read; both are left out where they have no value."""
        size = self.args.num_rollouts
        initial = [
            [Rollout(**sample) for sample in samples[start : start + size] if sample is not None]
            for start in range(0, len(samples), size)
        ]
        scored = [(p, rollouts) for p, rollouts in zip(prompts, initial, strict=True) if rollouts]
        self.pipeline.ahead["unscorable_prompts"] += len(prompts) - len(scored)
        kept = [p for p, _ in scored]
        if reads:
            with self.timed("attention"):
                self._read_rollouts(kept, [rollouts for _, rollouts in scored])
        return kept

    def _tokenize_draws(self, draws: Sequence[Draw]) -> list[PromptRollouts]:
        examples = [self.train_dataset[draw.index] for draw in draws]
        if not examples:
            return []
        prompt_ids, _, _ = self._tokenize_prompts([example["prompt"] for example in examples])
        return [
            PromptRollouts(draw, example, list(ids), [])
            for draw, example, ids in zip(draws, examples, prompt_ids, strict=True)
        ]

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _slots(self, points: dict[int, BranchPoints]) -> list[tuple[int, int]]:
        """Rollout and offset of each continuation of a prompt, each offset as often as it is rolled out."""
        times = range(self.args.rollouts_per_branch)
        return [(index, offset) for index, point in points.items() for offset in point.offsets for _ in times]

    def _request(self, prompt: PromptRollouts, head: list[int], sample: str) -> GenerationRequest:
        seed = None
        if self.args.seeded_sampling:
            seed = random.Random(f"{self.args.seed}/{prompt.draw.serial}/{sample}").getrandbits(31)
        return GenerationRequest(prompt.prompt_ids + head, self.max_completion_length - len(head), seed)

    def _initial_requests(self, prompts: Sequence[PromptRollouts]) -> Iterator[GenerationRequest]:
        for prompt in prompts:
            for i in range(self.args.num_rollouts):
                yield self._request(prompt, [], f"initial/{i}")

    def _continuation_requests(self, plan: BranchPlan) -> Iterator[GenerationRequest]:
        for prompt, points in plan:
            counts = dict.fromkeys(points, 0)
            for i, offset in self._slots(points):
                head = prompt.rollouts[i].tokens[:offset].tolist()
                yield self._request(prompt, head, f"branch/{i}/{counts[i]}")
                counts[i] += 1

    def _count(
        self,
        counters: dict[str, int],
        requests: Sequence[GenerationRequest],
        sampled: Sequence[GeneratedTokens],
        rewards: Tensor,
    ) -> None:
        """Add what was sampled and scored, rewards (n, F), to counters."""
        counters["samples"] += len(sampled)
        counters["generated_tokens"] += sum(len(s.token_ids) for s in sampled)
        counters["context_tokens"] += sum(len(request.prompt_ids) for request in requests)
        counters["missing_sampling_logps"] += count_missing_logps(sampled)
        counters["unscorable"] += int(torch.isnan(rewards).all(dim=1).sum())
        counters["empty"] += sum(not s.token_ids for s in sampled)

    def _samples(
        self, sampled: Sequence[GeneratedTokens], rewards: Tensor, extras: Sequence[dict], policy: int
    ) -> list[dict[str, Any] | None]:
        """Fields of a `Sample` for each that was sampled by a policy, rewards (n, F).

        `None` for one that no reward function could score, or that has no token: it has no value, and is left out of
        baselines, accuracies, filter and rows.
        """
        samples: list[dict[str, Any] | None] = []
        totals = weighted_rewards(rewards, self.reward_weights).tolist()
        for s, row, total, extra in zip(sampled, rewards.cpu().numpy(), totals, extras, strict=True):
            if math.isnan(total) or not s.token_ids:
                samples.append(None)
                continue
            samples.append(
                {
                    "tokens": to_tokens(s.token_ids),
                    "sampling_logps": to_array(s.logps),
                    "policy": policy,
                    "rewards": np.array(row, dtype=np.float32),
                    "reward": total,
                    "extra": extra,
                }
            )
        return samples

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def _score(self, scored: Sequence[tuple[PromptRollouts, np.ndarray]]) -> tuple[Tensor, list[dict[str, Any]]]:
        """(n, F) rewards of completions by TRL's own plumbing, in one call, and what is told of each for the table.

        TRL gathers the rewards, so ranks with fewer completions add some of their own that nobody reads.
        """
        counts = self.ranks.gather(torch.tensor([len(scored)], device=self.ranks.device))  # (ranks,)
        count = int(counts.max())
        if count == 0:
            return torch.zeros(0, len(self.reward_funcs), device=self.ranks.device), []
        eos = [self._tokenizer.eos_token_id]
        items = [(p.example, p.prompt_ids, tokens.tolist()) for p, tokens in scored]
        items += [(self.train_dataset[0], eos, eos)] * (count - len(scored))
        examples, prompt_ids, completion_ids = (list(column) for column in zip(*items, strict=True))
        prompts = [example["prompt"] for example in examples]
        completions = self._as_completions(prompts[0], prompt_ids, completion_ids)
        rewards = self._calculate_rewards(examples, prompts, completions, completion_ids)  # (ranks·n, F)
        idle_rows = torch.arange(count, device=counts.device).expand(len(counts), -1) >= counts[:, None]  # (ranks, n)
        rewards[idle_rows.flatten()] = torch.nan
        self._log_scored(rewards)
        extras = [
            {column: values[i] for column, values in self._pending_extra_logs.items() if i < len(values)}
            for i in range(len(scored))
        ]
        self._pending_extra_logs.clear()
        first = self.ranks.index * count
        return rewards[first : first + len(scored)], extras

    def _as_completions(self, prompt, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]) -> list:
        """Completions in the form of the prompts, as TRL gives them to reward functions."""
        if not isinstance(prompt, list):
            return self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        names = ("response_template", "response_schema")
        if any(getattr(self._tokenizer, name, None) is not None for name in names):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            return [[parse_response(self._tokenizer, ids, prefix=prefix)] for prefix, ids in pairs]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _log_scored(self, rewards: Tensor) -> None:
        """Log the rewards (ranks·n, F) of all that was just scored, and what reward functions logged themselves.

        The parent class does this inside the method that this pipeline replaces. Names are sorted so that all ranks
        gather in the same order.
        """
        for name, scores in zip(self.reward_func_names, rewards.T, strict=True):
            scores = scores[~scores.isnan()]
            if scores.numel():
                self.log_values({"mean": scores.mean().item()}, f"rewards/{name}")
                self.log_values({"std": scores.std(correction=0).item()}, f"rewards/{name}")
        pending = self._pending_metrics
        names = sorted(set(self.ranks.gather_list(list(pending))))
        self.log_values(self.ranks.means({n: (sum(pending.get(n, [])), len(pending.get(n, []))) for n in names}))
        pending.clear()

    # ---- forwards ---------------------------------------------------------------------------------------------------

    def _read_rollouts(self, prompts: Sequence[PromptRollouts], initial: Sequence[Sequence[Rollout]]) -> None:
        """Give prompts their rollouts, read in one no-grad forward over each; as many forwards on every rank."""
        flat = [(p.prompt_ids, r) for p, rollouts in zip(prompts, initial, strict=True) for r in rollouts]
        order = sorted(range(len(flat)), key=lambda i: len(flat[i][0]) + len(flat[i][1].tokens), reverse=True)
        size = self.args.per_device_train_batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        read: list[ReadRollout | None] = [None] * len(flat)
        eos = [self._tokenizer.eos_token_id]
        idle = (eos, Rollout(tokens=to_tokens(eos), sampling_logps=None, policy=0, rewards=np.zeros(0), reward=0.0))
        chunks += [[]] * (self.max_over_ranks(len(chunks)) - len(chunks))
        for chunk in self.progress(chunks, "Attention of rollouts"):
            results = self._read_chunk([flat[i] for i in chunk] or [idle])
            for i, result in zip(chunk, results, strict=False):  # an idle chunk's rollout is nobody's
                read[i] = result
        rollouts = iter(read)
        for prompt, own in zip(prompts, initial, strict=True):
            prompt.rollouts = [next(rollouts) for _ in own]

    def _read_chunk(self, chunk: Sequence[tuple[list[int], Rollout]]) -> list[ReadRollout]:
        rows = [TrainingRow.unscored(prompt_ids, rollout.tokens) for prompt_ids, rollout in chunk]
        batch = CompletionBatch.of(self._to_device(collate(rows, self._tokenizer.pad_token_id)))
        steps = [
            segment_steps(len(prompt_ids), rollout.tokens.tolist(), self.delimiters) for prompt_ids, rollout in chunk
        ]
        observer = None
        if self.args.reads_influence:
            observer = InfluenceObserver(
                batch.attention_mask,
                [s.ranges for s in steps],
                [s.stop_step for s in steps],
                self.args.influence_delta,
                self.args.influence_aggregation,
            )
        logps, entropies = self.forward_completions(
            batch, observer=observer, compute_entropy=self.args.reads_entropies
        )
        influences = observer.result() if observer is not None else None
        read = []
        for i, ((prompt_ids, rollout), segmentation) in enumerate(zip(chunk, steps, strict=True)):
            length, offset = len(rollout.tokens), len(prompt_ids)
            learnt = {
                "old_logps": logps[i, :length].float().cpu().numpy(),
                "step_ranges": [(start - offset, end - offset) for start, end in segmentation.ranges[1:]],
                "thinking_length": self.thinking.count_tokens(prompt_ids, rollout.tokens.tolist()),
            }
            if influences is not None:
                learnt["influence"] = influences[i][1:].cpu().numpy()  # entry 0 is the prompt
            if entropies is not None:
                learnt["entropies"] = entropies[i, :length].float().cpu().numpy()
            read.append(ReadRollout.at_next_stage(rollout, **learnt))
        return read

    def _reference_logps(self, batch: CompletionBatch) -> Tensor:
        """Log-probs under the frozen initial model, (B, T); the base model where an adapter is trained."""
        size = len(batch.input_ids)
        if self.ref_model is not None:
            return self.forward_completions(batch, model=self.ref_model, batch_size=size)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.forward_completions(batch, batch_size=size)[0]

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.ranks.device) for name, tensor in batch.items()}
