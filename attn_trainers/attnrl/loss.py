"""TRL's loss over the rows of an update, however they lie in micro-batches and on ranks."""

import torch
from torch import Tensor

from . import metrics
from .weights import PartWeight


class LossMixin:
    """The loss of `AttnRLTrainer`: a batch carries its `PartWeight` as `weight`, and rows that do not count."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_forward: dict[str, Tensor | None] = {}  # what the forward of the current loss gave

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """As the parent's; in the loss, of the rows that count alone: the others cost nothing and get zeros."""
        forward = super()._get_per_token_logps_and_entropies
        if not torch.is_grad_enabled():
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        counted = attention_mask[:, -logits_to_keep:].any(dim=1)  # (B,)
        counted[0] |= ~counted.any()  # a forward and a backward on every rank
        index = counted.nonzero()[:, 0]
        logps, entropies, aux_loss = forward(
            model, input_ids[index], attention_mask[index], logits_to_keep, *args, **kwargs
        )
        if len(index) < len(input_ids):
            shape = (len(input_ids), logps.size(1))
            logps = logps.new_zeros(shape).index_copy(0, index, logps)
            if entropies is not None:
                entropies = entropies.new_zeros(shape).index_copy(0, index, entropies)
        self._loss_forward = {"logps": logps.detach(), "entropies": entropies, "aux_loss": aux_loss}
        return logps, entropies, aux_loss

    def get_high_entropy_mask(self, *args, **kwargs):
        self._loss_forward["entropy_mask"] = super().get_high_entropy_mask(*args, **kwargs)
        return self._loss_forward["entropy_mask"]

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        weight, micro_batches = inputs["weight"], self.current_gradient_accumulation_steps
        is_above = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        entropy_coef = 0.0 if is_above else self.entropy_coef
        self.current_gradient_accumulation_steps = weight.steps
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.current_gradient_accumulation_steps = micro_batches
        loss = loss + self._token_share_correction(inputs["completion_mask"], weight, entropy_coef)
        if self._entropy_bonus_enabled:
            self._metrics["train"]["policy_loss"][-1] *= weight.metric_scale
        self.log_means(metrics.ratio_totals(inputs, self._loss_forward["logps"]), self.metric_prefix)
        self._loss_forward = {}
        return loss

    def _token_share_correction(self, mask: Tensor, weight: PartWeight, entropy_coef: float) -> Tensor | float:
        """What makes the entropy bonus and the router's loss, which TRL divides as the policy's, weigh by tokens."""
        correction, excess = 0.0, 1.0 / weight.steps - weight.token_share
        if self._entropy_bonus_enabled:
            counted = mask * self._loss_forward.get("entropy_mask", 1)
            entropy = (self._loss_forward["entropies"] * counted).sum() / counted.sum().clamp(min=1.0)
            correction = correction + entropy_coef * excess * entropy
        if self.aux_loss_enabled:
            correction = correction - self.router_aux_loss_coef * excess * self._loss_forward["aux_loss"]
        return correction
