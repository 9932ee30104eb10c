"""pass@k and thinking lengths during training, from what TRL's own evaluation generates and scores anyway."""

import torch

from .evaluation import default_pass_at, pass_at_k


class EvaluationMixin:
    """Adds pass@k to the evaluation logs of a `GRPOTrainer` (`class MyTrainer(EvaluationMixin, GRPOTrainer)`).

    TRL evaluates `eval_dataset` every `eval_steps`, draws `num_generations_eval` completions per prompt and logs mean
    reward, lengths and the share truncated. From the first reward function (right where above 0) this logs
    `eval_pass@k`, for k the powers of two up to `num_generations_eval`. Nothing is generated again and no collective
    is added: TRL gathers the rewards over all ranks, so every rank logs the same.
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (ranks·B, F)
        if not self.model.training:
            n = self.num_generations_eval
            right = (torch.nan_to_num(rewards[:, 0]) > 0).view(-1, n).sum(dim=1).tolist()  # (prompts,)
            for k in default_pass_at(n):
                # One entry per prompt: TRL logs the mean of the entries.
                self._metrics["eval"][f"pass@{k}"].extend(pass_at_k(n, c, k) for c in right)
        return rewards
