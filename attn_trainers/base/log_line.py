"""A line of the few numbers that tell how a run goes, where `transformers` prints all metrics of each log."""

import re
from collections.abc import Mapping

from transformers import PrinterCallback, ProgressCallback, Trainer


# Metric to how it is shown; what a log lacks is left out.
Fields = Mapping[str, str]

COMMON: Fields = {
    "reward": "  reward {:.2f}",
    "completions/mean_length": "  length {:.0f}",
    "completions/mean_thinking_length": " (thinking {:.0f})",
    "completions/clipped_ratio": "  cut {:.0%}",
    "entropy": "  entropy {:.2f}",
}
_EVALUATION = re.compile(r"eval_(?:(.+)_)?(reward|pass@\d+|completions/mean_(?:thinking_)?length)")


def log_line(logs: Mapping[str, object], step: int, fields: Fields) -> str | None:
    """The line of a log, e.g. `step 40  reward 0.31  length 412 (thinking 371)  influence 0.9  mixed 62 %`.

    Args:
        logs: of training, of one evaluation, or of the end of the run.
        step: optimizer steps done.
        fields: what is shown of training.

    Returns:
        `None` for a log that has nothing of this.
    """
    evaluated: dict[str, object] = {}
    data = ""
    for name, value in logs.items():
        if match := _EVALUATION.fullmatch(name):
            data, evaluated[match[2]] = match[1] or "", value
    if evaluated:
        passed = {name: f"  {name} {{:.0%}}" for name in evaluated if name.startswith("pass@")}
        text = _filled(passed | dict(COMMON), evaluated)
        return f"step {step}  evaluation{' of ' * bool(data)}{data}{text}"
    if "train_runtime" in logs:
        return f"{step} steps in {logs['train_runtime']:.0f} s"
    text = _filled(fields, logs)
    return f"step {step}{text}" if text else None


def _filled(fields: Fields, values: Mapping[str, object]) -> str:
    shown = [text.format(values[name]) for name, text in fields.items() if values.get(name) is not None]
    return "".join(shown).replace("%", " %")


class _Line:
    """`log_line` in place of what a callback of `transformers`, the next of the bases, shows of a log."""

    def __init__(self, fields: Fields):
        super().__init__()
        self.fields = fields

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs, state.global_step, self.fields)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif state.is_world_process_zero:
            self.write(line)


class LineInBar(_Line, ProgressCallback):
    """The progress bar of `transformers`, with `log_line` above it at each log."""

    def write(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)


class LinePrinter(_Line, PrinterCallback):
    """`log_line` at each log, printed without a bar."""

    def write(self, line: str) -> None:
        print(line, flush=True)


def print_lines(trainer: Trainer, fields: Fields) -> None:
    """Put the line in place of what the trainer prints of each log; a notebook's table stays."""
    for plain, with_line in ((ProgressCallback, LineInBar), (PrinterCallback, LinePrinter)):
        if any(type(callback) is plain for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(plain)
            trainer.add_callback(with_line(fields))
