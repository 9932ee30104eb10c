"""pass@k and thinking lengths during training, from what TRL's own evaluation generates and scores anyway."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object

from ..evaluation.statistics import default_pass_at, pass_at_k


class EvaluationMixin:
    """Adds pass@k and thinking length to the evaluation logs of a `GRPOTrainer` (named before it in the bases).

    TRL evaluates `eval_dataset` every `eval_steps`, draws `num_generations_eval` completions per prompt and logs mean
    reward, lengths and the share truncated. From the reward function that is the correctness (right where above 0)
    this logs `eval_pass@k`, for k the powers of two up to `num_generations_eval`, and
    `eval_completions/mean_thinking_length` in tokens (`EndOfThinking.count_tokens`). Nothing is generated again, and
    every rank logs the same.

    Of several named data sets each logs under its own name, `eval_<name>_pass@1`, what TRL measures included.
    """

    _metric_key_prefix = "eval"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name = self.args.accuracy_reward or self.reward_func_names[0]
        if name not in self.reward_func_names:
            raise ValueError(
                f"accuracy_reward={name!r} is no reward function of this trainer; set it to one of "
                f"{', '.join(self.reward_func_names)}."
            )
        self.accuracy_column = self.reward_func_names.index(name)
        self.own_columns: set[str] = set()  # of the table of completions, which only training fills

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._metric_key_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._metric_key_prefix = "eval"

    def log(self, logs, start_time=None):
        name = self._metric_key_prefix.removeprefix("eval").removeprefix("_")
        if name and not self.model.training:
            # TRL puts "eval_" alone before what it measured: the next data set would log over it.
            measured = dict(self._metrics["eval"])
            self._metrics["eval"].clear()
            self._metrics["eval"].update({f"{name}_{key}": values for key, values in measured.items()})
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            # In the table of completions, rows of an evaluation have no value in columns of the training's own.
            for column in self.own_columns & self._logs["extra"].keys():
                self._logs["extra"][column].extend([None] * len(inputs) * self.accelerator.num_processes)
        return output

    def add_column(self, name: str, values: Sequence) -> None:
        """Add values of all ranks' latest training rows to a column of the table of completions."""
        self.own_columns.add(name)
        column = self._logs["extra"][name]
        if not column:
            column.extend([None] * (len(self._logs["prompt"]) - len(values)))
        column.extend(values)

    def thinking_lengths(self, prompts, completion_ids_list) -> list[int]:
        """Tokens of the thinking of each completion."""
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        pairs = zip(prompt_ids, completion_ids_list, strict=True)
        return [self.thinking.count_tokens(prompt, ids) for prompt, ids in pairs]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (ranks·B, F)
        if not self.model.training:
            n = self.num_generations_eval
            right = (
                (torch.nan_to_num(rewards[:, self.accuracy_column]) > 0).view(-1, n).sum(dim=1).tolist()
            )  # (prompts,)
            for k in default_pass_at(n):
                # One entry per prompt: TRL logs the mean of the entries.
                self._metrics["eval"][f"pass@{k}"].extend(pass_at_k(n, c, k) for c in right)
            lengths = self.thinking_lengths(prompts, completion_ids_list)
            self._metrics["eval"]["completions/mean_thinking_length"].extend(gather_object(lengths))
        return rewards
