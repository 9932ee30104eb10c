"""The base of all trainers here: TRL's `GRPOTrainer` with what a long run needs around any method."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from ..thinking import EndOfThinking
from .card import CardMixin
from .checkpoints import read_state, write_state
from .config import MethodConfig
from .credit import BatchCredit, CreditMethod, SignalPass
from .evaluation import EvaluationMixin
from .exhibits import ExhibitCallback, completions_markdown
from .forwards import ForwardMixin
from .generation import GenerationMixin
from .interruption import SafeExitMixin
from .log_line import COMMON, print_lines
from .pages import telling_row
from .ranks import Ranks, Totals


TABLE_ROWS = 16  # completions in TensorBoard where `num_completions_to_print` says nothing


class BaseTrainer(CardMixin, SafeExitMixin, EvaluationMixin, GenerationMixin, ForwardMixin, GRPOTrainer):
    """
    `GRPOTrainer` that generates with a limit per request and syncs vLLM right on any device (`GenerationMixin`), logs
    pass@k in evaluation (`EvaluationMixin`), leaves only whole checkpoints, one of them on SIGTERM (`SafeExitMixin`),
    and writes a card that tells method and settings (`CardMixin`). What it shows of a run goes to the output folder
    and the trackers (`exhibits`).

    A subclass names its `config_class` and `metric_prefix`, and says by `method_state` what outlives a step.
    """

    config_class: type[MethodConfig]
    # Name under which metrics appear, and of the state beside a checkpoint, e.g. "attnpo".
    metric_prefix: str
    # Arguments of `GRPOTrainer` that do not go with single-turn completions which the trainer samples itself.
    unsupported = ("tools", "environment_factory", "rollout_func")

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_name.split('/')[-1]}-{self._name}")
        for name in self.unsupported:
            if kwargs.get(name):
                raise ValueError(f"{name} is set, but {type(self).__name__} takes single-turn completions; unset it.")
        datasets = {"train_dataset": more[0] if more else kwargs.get("train_dataset")}
        datasets["eval_dataset"] = more[1] if len(more) > 1 else kwargs.get("eval_dataset")
        for name, dataset in datasets.items():
            images = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
            if images:
                raise ValueError(
                    f"{name} has the column {images.pop()!r}, but {type(self).__name__} reads the attention of text "
                    "alone; remove the column."
                )
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._refuse_images()
        self.ranks = Ranks(self.accelerator)
        self.thinking = EndOfThinking(self._tokenizer, self.args.end_of_thinking)
        self.exhibits = ExhibitCallback(self.args.output_dir, lambda: self.callback_handler.callbacks)
        self.add_callback(self.exhibits)
        self.line_fields = dict(COMMON)  # of the line at each log
        if self.args.log_line:
            print_lines(self, self.line_fields)

    def _refuse_images(self) -> None:
        columns = (self.train_dataset.column_names if self.train_dataset is not None else None) or []
        found = [f"train_dataset has the column {name!r}" for name in ("image", "images") if name in columns]
        found += ["processing_class is a multimodal processor"] * self._is_vlm
        if found:
            raise ValueError(
                f"{found[0]}, but {type(self).__name__} reads text only; use text prompts and a text model."
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """With the end of thinking as a column of its own, and with thinking tags that plain decoding drops."""
        inputs = [{**example, "end_of_thinking": self.args.end_of_thinking} for example in inputs]
        if self.thinking.is_special:
            texts = [self.thinking.text(ids) for ids in completion_ids_list]
            conversational = bool(completions) and isinstance(completions[0], list)
            completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        """Advantages times `inputs["credit"]`, (B, T), where a credit method gave factors."""
        if "credit" in inputs:
            advantages = inputs["advantages"]
            if advantages.dim() == 1:
                advantages = advantages.unsqueeze(1)  # (B, 1)
            inputs = {**inputs, "advantages": advantages * inputs["credit"]}  # (B, T)
        return super()._compute_loss(model, inputs)

    # ---- metrics ----------------------------------------------------------------------------------------------------

    def log_values(self, values: Mapping[str, float], prefix: str = "") -> None:
        """Add values to the means that are logged, as `<prefix>/<name>` where a prefix is given."""
        for name, value in values.items():
            self._metrics["train"][f"{prefix}/{name}" if prefix else name].append(value)

    def log_means(self, totals: Totals, prefix: str) -> None:
        """Log each value's sum over its count, both over all ranks, in one collective; names are the same on all."""
        self.log_values(self.ranks.means(totals), prefix)

    def log(self, logs, start_time=None):
        has_rows = self.log_completions and self.model.training and bool(self._logs["prompt"])
        if has_rows and self.ranks.is_first and "train_runtime" not in logs:  # the end of a run has no rows of its own
            names = {"prompt": "prompt", "completion": "completion", "advantages": "advantage"}
            columns = {shown: list(self._logs[name]) for name, shown in names.items()}
            columns |= {name: list(v) for kind in ("rewards", "extra") for name, v in self._logs[kind].items()}
            count = self.num_completions_to_print or TABLE_ROWS
            self.exhibits.offer_completions(lambda: completions_markdown(columns, count, self.log_unique_prompts))
        super().log(logs, start_time)

    def offer_page(
        self,
        method: CreditMethod | None,
        credit: BatchCredit,
        passes: Sequence[SignalPass],
        advantages: Sequence[Tensor],
    ) -> None:
        """Have the next log show a page of this rank's rows, if `log_pages` is set: the credit method's own, or one of
        the row whose tokens differ most in advantage times factor.

        Args:
            method: the credit method, if there is one.
            credit: what it answered.
            passes: the rows of a generation batch.
            advantages: per pass (B, 1) or (B, T).
        """
        if not (self.args.log_pages and self.ranks.is_first and passes):
            return
        title = f"Step {self.state.global_step}"
        row = telling_row(passes, advantages, credit.factors)

        def make():
            page = None if method is None else method.page(credit, title)
            return page or row.page(self._tokenizer, title)

        self.exhibits.offer("pages", make)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Log the seconds of the context as `<metric_prefix>/seconds/<name>`."""
        start = time.perf_counter()
        yield
        self.log_values({f"seconds/{name}": time.perf_counter() - start}, self.metric_prefix)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def method_state(self) -> dict:
        """What of the method outlives a step, as JSON types; saved beside each checkpoint."""
        return {}

    def load_method_state(self, state: dict) -> None:
        """Take up what `method_state` gave."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
            write_state(folder, self.metric_prefix, self.method_state())

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        state = read_state(checkpoint, self.metric_prefix) if checkpoint is not None else None
        if state is not None:
            self.load_method_state(state)
