"""How AttnRL comes by rollouts: one generation call, one scoring, one no-grad forward over what is new."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import use_adapter

from ..attention import InfluenceObserver
from ..base.credit import CompletionBatch, weighted_rewards
from ..sampling.requests import GeneratedTokens, GenerationRequest, count_missing_logps
from .exploration import BranchPoints
from .pipeline import Draw
from .rollouts import BranchedRollout, Continuation, PromptRollouts, ReadRollout, Rollout, to_array
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
        slots = [(p, i, offset) for p, points in plan for i, offset in self._slots(points)]
        requests = [*self._continuation_requests(plan), *self._initial_requests(new)]
        with self.timed("generate"):
            sampled = self.generate_requests(requests)
        self._count(sampled)
        completions = [(p, p.rollouts[i].tokens[:offset]) for p, i, offset in slots]
        completions += [(p, []) for p in new for _ in range(self.args.num_rollouts)]
        with self.timed("reward"):
            rewards = self._score([(p, head + s.token_ids) for (p, head), s in zip(completions, sampled, strict=True)])
        scored = self._samples(sampled, rewards)
        continuations = {(id(p), i): [] for p, points in plan for i in points}
        for p, i, offset in slots:
            continuations[id(p), i].append(Continuation(offset=offset, **next(scored)))
        for p, points in plan:
            for i, point in points.items():
                branches = continuations[id(p), i]
                p.rollouts[i] = BranchedRollout.at_next_stage(p.rollouts[i], branch_points=point, branches=branches)
        initial = [[Rollout(**next(scored)) for _ in range(self.args.num_rollouts)] for _ in new]
        if draws:
            with self.timed("attention"):
                self._read_rollouts(new, initial)
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
                yield self._request(prompt, prompt.rollouts[i].tokens[:offset], f"branch/{i}/{counts[i]}")
                counts[i] += 1

    def _count(self, sampled: Sequence[GeneratedTokens]) -> None:
        counters = self.pipeline.counters
        counters["samples"] += len(sampled)
        counters["generated_tokens"] += sum(len(s.token_ids) for s in sampled)
        counters["missing_sampling_logps"] += count_missing_logps(sampled)

    def _samples(self, sampled: Sequence[GeneratedTokens], rewards: Tensor) -> Iterator[dict]:
        """Fields of a `Sample` for each that was sampled; rewards (n, F)."""
        totals = weighted_rewards(rewards, self.reward_weights).nan_to_num(nan=0.0).tolist()
        for s, row, total in zip(sampled, rewards.cpu().numpy(), totals, strict=True):
            yield {
                "tokens": s.token_ids,
                "sampling_logps": to_array(s.logps),
                "policy": self.pipeline.batches_trained,
                "rewards": np.asarray(row, dtype=np.float32),
                "reward": total,
            }

    # ---- rewards ----------------------------------------------------------------------------------------------------

    def _score(self, scored: Sequence[tuple[PromptRollouts, list[int]]]) -> Tensor:
        """(n, F) rewards of completions by TRL's own plumbing, in one call.

        TRL gathers the rewards, so ranks with fewer completions add some of their own that nobody reads.
        """
        counts = self.ranks.gather(torch.tensor([len(scored)], device=self.ranks.device))  # (ranks,)
        count = int(counts.max())
        if count == 0:
            return torch.zeros(0, len(self.reward_funcs), device=self.ranks.device)
        idle = (self.train_dataset[0], [self._tokenizer.eos_token_id])
        items = [(p.example, tokens) for p, tokens in scored] + [idle] * (count - len(scored))
        examples = [example for example, _ in items]
        completion_ids = [tokens for _, tokens in items]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        conversational = isinstance(examples[0]["prompt"], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        prompts = [example["prompt"] for example in examples]
        rewards = self._calculate_rewards(examples, prompts, completions, completion_ids)  # (ranks·n, F)
        idle_rows = torch.arange(count, device=counts.device).expand(len(counts), -1) >= counts[:, None]  # (ranks, n)
        rewards[idle_rows.flatten()] = torch.nan
        self._log_scored(prompts, completions, rewards)
        first = self.ranks.index * count
        local = rewards[first : first + len(scored)]
        self.pipeline.counters["unscorable"] += int(torch.isnan(local).all(dim=1).sum())
        return local

    def _log_scored(self, prompts: list, completions: list, rewards: Tensor) -> None:
        """Log the rewards (ranks·n, F) of all that was just scored, and the completions if `log_completions` is on.

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
        if self.log_completions:
            self._logs["prompt"].extend(self.ranks.gather_list(prompts))
            self._logs["completion"].extend(self.ranks.gather_list(completions))
            for name, scores in zip(self.reward_func_names, rewards.T, strict=True):
                self._logs["rewards"][name].extend(scores.tolist())
            self._logs["advantages"].extend([float("nan")] * rewards.size(0))
            for column in sorted(set(self.ranks.gather_list(list(self._pending_extra_logs)))):
                values = self._pending_extra_logs.get(column, [None] * len(prompts))
                self._logs["extra"][column].extend(self.ranks.gather_list(values))
        self._pending_extra_logs.clear()

    # ---- forwards ---------------------------------------------------------------------------------------------------

    def _read_rollouts(self, prompts: Sequence[PromptRollouts], initial: Sequence[Sequence[Rollout]]) -> None:
        """Give prompts their rollouts, read in one no-grad forward over each; as many forwards on every rank."""
        flat = [(p.prompt_ids, r) for p, rollouts in zip(prompts, initial, strict=True) for r in rollouts]
        order = sorted(range(len(flat)), key=lambda i: len(flat[i][0]) + len(flat[i][1].tokens), reverse=True)
        size = self.args.per_device_train_batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        read: list[ReadRollout | None] = [None] * len(flat)
        eos = [self._tokenizer.eos_token_id]
        idle = (eos, Rollout(tokens=eos, sampling_logps=None, policy=0, rewards=np.zeros(0), reward=0.0))
        for chunk in chunks + [[]] * (self.max_over_ranks(len(chunks)) - len(chunks)):
            results = self._read_chunk([flat[i] for i in chunk] or [idle])
            for i, result in zip(chunk, results, strict=False):  # an idle chunk's rollout is nobody's
                read[i] = result
        rollouts = iter(read)
        for prompt, own in zip(prompts, initial, strict=True):
            prompt.rollouts = [next(rollouts) for _ in own]

    def _read_chunk(self, chunk: Sequence[tuple[list[int], Rollout]]) -> list[ReadRollout]:
        rows = [TrainingRow.unscored(prompt_ids, rollout.tokens) for prompt_ids, rollout in chunk]
        batch = CompletionBatch.of(self._to_device(collate(rows, self._tokenizer.pad_token_id)))
        steps = [segment_steps(len(prompt_ids), rollout.tokens, self.delimiters) for prompt_ids, rollout in chunk]
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
            }
            if influences is not None:
                learnt["influence"] = influences[i][1:].cpu().numpy()  # entry 0 is the prompt
            if entropies is not None:
                learnt["entropies"] = entropies[i, :length].float().cpu().numpy()
            read.append(ReadRollout.at_next_stage(rollout, **learnt))
        return read

    def _reference_logps(self, batch: CompletionBatch) -> Tensor:
        """Log-probs under the frozen initial model, (B, T); the base model where an adapter is trained."""
        if self.ref_model is not None:
            return self.forward_completions(batch, model=self.ref_model)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.forward_completions(batch)[0]

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.ranks.device) for name, tensor in batch.items()}
