"""The forwards AttnRL makes without gradients: what one pass over a rollout tells, and log-probs of training rows."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..attention import InfluenceObserver, observe_attention
from .rollouts import PromptRollouts, Rollout
from .rows import TrainingRow, collate
from .steps import segment_steps


class ForwardMixin:
    """No-grad forwards of `AttnRLTrainer`; as many on every rank, whatever rows it has."""

    def _read_rollouts(self, prompts: Sequence[PromptRollouts]) -> None:
        """Old log-probs and influence of initial rollouts, in one no-grad forward over each; as many on every rank."""
        rollouts = [(prompt.prompt_ids, rollout) for prompt in prompts for rollout in prompt.rollouts]
        rollouts.sort(key=lambda item: len(item[0]) + len(item[1].tokens), reverse=True)
        size = self.args.per_device_train_batch_size
        chunks = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        idle = ([self._tokenizer.eos_token_id], Rollout([self._tokenizer.eos_token_id], None, self.batches_trained))
        for chunk in chunks + [[idle]] * (self.max_over_ranks(len(chunks)) - len(chunks)):
            self._read_chunk(chunk)

    def _read_chunk(self, chunk: Sequence[tuple[list[int], Rollout]]) -> None:
        rows = [TrainingRow.unscored(prompt_ids, rollout.tokens) for prompt_ids, rollout in chunk]
        batch = self._to_device(collate(rows, self._tokenizer.pad_token_id))
        segmentations = [
            segment_steps(len(prompt_ids), rollout.tokens, self.delimiters) for prompt_ids, rollout in chunk
        ]
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)  # (B, P+T)
        needs_attention = self.args.num_branch_points > 0 and (
            self.args.branching == "attention" or self.args.filter_easy_prompts
        )
        observer = InfluenceObserver(
            attention_mask,
            [s.ranges for s in segmentations],
            [s.stop_step for s in segmentations],
            self.args.influence_delta,
        )
        with observe_attention(self.model, observer) if needs_attention else nullcontext():
            logps, entropies = self._forward_logps(batch, compute_entropy=self.args.branching == "entropy")
        influences = observer.result() if needs_attention else [None] * len(chunk)
        for i, ((prompt_ids, rollout), segmentation) in enumerate(zip(chunk, segmentations, strict=True)):
            length = len(rollout.tokens)
            rollout.old_logps = logps[i, :length].float().cpu().numpy()
            rollout.step_ranges = [
                (start - len(prompt_ids), end - len(prompt_ids)) for start, end in segmentation.ranges[1:]
            ]
            if needs_attention:
                rollout.influence = influences[i][1:].cpu().numpy()  # entry 0 is the prompt
            if entropies is not None:
                rollout.entropies = entropies[i, :length].float().cpu().numpy()

    def _forward_logps(self, batch: dict[str, Tensor], compute_entropy: bool = False, model=None):
        """Log-probs (and entropies) of a micro-batch's completion tokens, (B, T), without gradients."""
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)  # (B, P+T)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)  # (B, P+T)
        model = self.model if model is None else model
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, entropies, _ = self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                batch["completion_ids"].size(1),
                compute_entropy=compute_entropy,
            )
        return logps, entropies

    def _reference_logps(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probs under the frozen initial model, (B, T); the base model where an adapter is trained."""
        if self.ref_model is not None:
            return self._forward_logps(batch, model=self.ref_model)[0]
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._forward_logps(batch)[0]

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
