"""What a run shows beside numbers: pictures, pages and completions, on disk and in trackio, wandb and TensorBoard.

A trainer offers the latest of each kind as a function that makes it; nothing is made before an entry of the log asks
for it. The files lie in the output folder, and go to the trackers that `report_to` names through the connections
that the callbacks of `transformers` opened.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..tables import cell, markdown_table


logger = logging.getLogger(__name__)

TRACKERS = {TrackioCallback: "trackio", WandbCallback: "wandb", TensorBoardCallback: "TensorBoard"}

# What a tracker's callback does while a run goes on or when all is done; that it cannot start is told at once.
_GUARDED_EVENTS = ("on_log", "on_train_end", "on_push_begin")


@dataclass(frozen=True)
class Picture:
    """A picture; `draw` writes it as PNG."""

    draw: Callable[[Path], None]
    suffix = ".png"

    def write(self, path: Path) -> None:
        self.draw(path)


@dataclass(frozen=True)
class Page:
    """A page: `html`, and the same in Markdown for trackers that show no HTML."""

    html: str
    markdown: str
    suffix = ".html"

    def write(self, path: Path) -> None:
        path.write_text(self.html, encoding="utf-8")


Exhibit = Picture | Page


def to_tensorboard(writer, name: str, exhibit: Exhibit, path: Path, step: int) -> None:
    """Send an exhibit to a `SummaryWriter`."""
    if isinstance(exhibit, Page):
        writer.add_text(name, exhibit.markdown, step)
    else:
        pixels = (imread(path)[:, :, :3] * 255).round().astype(np.uint8)  # (H, W, 3)
        writer.add_image(name, pixels, step, dataformats="HWC")
    writer.flush()


def to_module(module, name: str, exhibit: Exhibit, path: Path, step: int) -> None:
    """Send an exhibit to trackio or wandb, whose interfaces are alike."""
    shown = module.Html(exhibit.html) if isinstance(exhibit, Page) else module.Image(str(path))
    module.log({name: shown, "train/global_step": step})


class ExhibitCallback(TrainerCallback):
    """
    Makes what was offered when the training log gets an entry, and sends it to the trackers; on the first rank only.

    A tracker that fails costs what it was sent, not the run: the first failure of each is told, all are counted. That
    holds for the metrics that the trackers' own callbacks send, too, and for an exhibit that cannot be made.

    Args:
        folder: output folder of the run.
        callbacks: all callbacks of the trainer, asked anew each time.

    Attributes:
        failures: by name of the tracker or exhibit.
    """

    def __init__(self, folder: str | Path, callbacks: Callable[[], Sequence[TrainerCallback]]):
        self.folder = Path(folder)
        self.callbacks = callbacks
        self.failures: Counter[str] = Counter()
        self._offered: dict[str, Callable[[], Exhibit]] = {}
        self._table: Callable[[], str] | None = None
        for callback, tracker in self._trackers():
            for event in _GUARDED_EVENTS:
                setattr(callback, event, self._guarded(tracker, getattr(callback, event)))

    def offer(self, name: str, make: Callable[[], Exhibit]) -> None:
        """Have `make` called at the next entry of the training log, in place of what was offered under the name."""
        self._offered[name] = make

    def offer_completions(self, markdown: Callable[[], str]) -> None:
        """As `offer`, of a table of completions for TensorBoard; TRL sends its own to the other trackers."""
        self._table = markdown

    def on_log(self, args, state, control, **kwargs):
        offered, self._offered = self._offered, {}
        table, self._table = self._table, None
        if not state.is_world_process_zero:
            return
        for name, make in offered.items():
            self._guarded(name, self._show)(name, make, state.global_step)
        for callback, tracker in self._trackers():
            if table is not None and isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                self._guarded(tracker, callback.tb_writer.add_text)("completions", table(), state.global_step)

    def _show(self, name: str, make: Callable[[], Exhibit], step: int) -> None:
        """Make an exhibit, write it and send it."""
        exhibit = make()
        path = self.folder / name / f"step-{step:06d}{exhibit.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exhibit.write(path)
        for send in self._senders():
            send(name, exhibit, path, step)

    def on_train_end(self, args, state, control, **kwargs):
        for name, count in self.failures.items():
            logger.warning("%s failed %d times in this run.", name, count)

    # ---- trackers ---------------------------------------------------------------------------------------------------

    def _trackers(self) -> Iterator[tuple[TrainerCallback, str]]:
        for callback in self.callbacks():
            for kind, tracker in TRACKERS.items():
                if isinstance(callback, kind):
                    yield callback, tracker

    def _senders(self) -> Iterator[Callable[[str, Exhibit, Path, int], None]]:
        """What sends an exhibit to each tracker that is connected."""
        for callback, tracker in self._trackers():
            if isinstance(callback, TensorBoardCallback):
                connection = callback.tb_writer
                send = partial(to_tensorboard, connection)
            else:
                connection = callback._trackio if isinstance(callback, TrackioCallback) else callback._wandb
                send = partial(to_module, connection)
            if connection is not None:
                yield self._guarded(tracker, send)

    def _guarded(self, name: str, function: Callable) -> Callable:
        """The function, whose failures are counted under the name, and the first is told."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:  # a library's own, of any kind
                self.failures[name] += 1
                if self.failures[name] == 1:
                    logger.warning("%s failed, and the run goes on without it: %r", name, error)

        return call


def completions_markdown(columns: dict[str, Sequence], count: int, unique_prompts: bool = False) -> str:
    """A Markdown table of the first rows of logged completions.

    Args:
        columns: values by the name of their column, "prompt" among them; texts, conversations or numbers.
        count: rows at most.
        unique_prompts: whether only the first row of each prompt is taken.
    """
    prompts = list(map(str, columns["prompt"]))
    rows = [row for row, prompt in enumerate(prompts) if not unique_prompts or prompt not in prompts[:row]][:count]
    return markdown_table(list(columns), [[_shown(values[row]) for values in columns.values()] for row in rows])


def _shown(value: object) -> str:
    """A value as the text of a cell."""
    if isinstance(value, list):  # a conversation
        value = "\n".join(str(message.get("content", "")) for message in value)
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else cell(str(value))
