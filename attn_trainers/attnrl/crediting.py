"""A credit method on trees: what leaves are worth, and the factors of the rows that are trained on."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..base.credit import BatchCredit, CreditContext, group_accuracies, mean_factors, weighted_rewards
from .rollouts import PromptRollouts
from .rows import LeafValues


class CreditingMixin:
    """What `AttnRLTrainer` asks of its credit method; as many collectives on every rank."""

    def _leaf_values(self, prompts: Sequence[PromptRollouts]) -> list[LeafValues]:
        """What the leaves of each prompt are worth, shaped by the credit method over all leaves of a prompt."""
        if self.credit is None or not prompts:
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

    def _assign_credit(self, parts, facts) -> BatchCredit:
        """Give each micro-batch its factors, (B, T)."""
        context = CreditContext(
            ranks=self.ranks,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            observe=lambda batch, observer: self.forward_completions(
                batch, observer=observer, batch_size=len(batch.input_ids)
            ),
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
        return credit

    def _mean_factors(self, parts, facts, credit: BatchCredit) -> dict[str, float]:
        """Mean factor of each row of all ranks, by its key; a collective under a credit method."""
        own = [
            (key, factor)
            for (_, signal), known, factors in zip(parts, facts, credit.factors or [], strict=bool(credit.factors))
            for key, factor in zip(known.keys, mean_factors(signal.batch, factors), strict=True)
        ]
        return dict(self.ranks.gather_list(own)) if self.credit is not None else {}
