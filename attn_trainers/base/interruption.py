"""Runs that end early: whole checkpoints only, and a checkpoint on SIGTERM.

`transformers` writes a checkpoint file by file into its final folder, each rank its own part, and takes the newest
folder to resume from: after a full disk or a kill that may be a torn one. Here a checkpoint counts once every rank has
written its part and a seal with the sizes of all files lies in the folder. Older checkpoints are removed, and uploads
started, only after that.
"""

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .revisions import RevisionPushes, add_card


logger = logging.getLogger(__name__)

SEAL = "seal.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class TrainingInterrupted(SystemExit):
    """Raised by `train` after SIGTERM, when the checkpoint is written; ends the process with status 143 if not caught.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step


def _file_sizes(folder: Path) -> dict[str, int]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def seal_checkpoint(folder: str | Path) -> None:
    """State that everything in the folder is written; the seal itself is written whole or not at all."""
    folder = Path(folder)
    partial = folder / f"{SEAL}.partial"
    partial.write_text(json.dumps({"files": _file_sizes(folder)}, indent=2))
    partial.replace(folder / SEAL)


def is_whole(folder: str | Path) -> bool:
    """Whether the folder is sealed and holds each file of the seal in its full size."""
    folder = Path(folder)
    try:
        files = json.loads((folder / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    present = _file_sizes(folder)
    return all(present.get(name) == size for name, size in files.items())


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a folder, or `None`; newer torn ones are named in a warning."""
    if not os.path.isdir(output_dir):
        return None
    steps = {path: _CHECKPOINT.fullmatch(path.name) for path in Path(output_dir).iterdir() if path.is_dir()}
    for path in sorted((p for p, m in steps.items() if m), key=lambda p: int(steps[p][1]), reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning(
            "%s is not whole (writing it was cut off, or another program wrote it) and is passed over. To resume from "
            "it nevertheless, set resume_from_checkpoint.",
            path,
        )
    return None


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, keep: Sequence[str | Path]) -> None:
    """Remove the whole checkpoints that were sealed first until `limit` are left; those in `keep` stay.

    Torn ones are not counted: else they could take the place of the last whole one.
    """
    if not limit or limit < 0:
        return
    seals = sorted(
        Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{SEAL}"), key=lambda path: path.stat().st_mtime_ns
    )
    kept = {Path(path).resolve() for path in keep}
    spare = [seal.parent for seal in seals if seal.parent.resolve() not in kept]
    for folder in spare[: max(0, len(seals) - limit)]:
        (folder / SEAL).unlink()  # a folder that is removed in part is torn
        shutil.rmtree(folder, ignore_errors=True)


class SafeExitCallback(TrainerCallback):
    """Turns SIGTERM on any rank into a checkpoint and a stop of all ranks at the end of the generation batch.

    A checkpoint inside a generation batch would repeat its prompts on resume (`attn_trainers.base.checkpoints`), so
    the run goes on until its last update: at most as long as one generation batch takes, sampling and updates
    together.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.requested = False  # SIGTERM reached this rank
        self.interrupted = False  # all ranks agreed to stop
        self._previous_handler = None

    def _on_sigterm(self, signum, frame) -> None:
        self.requested = True
        logger.warning("SIGTERM: a checkpoint is written at the end of this generation batch, then training stops.")

    def on_train_begin(self, args, state, control, **kwargs):
        self.requested = self.interrupted = False
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore_handler()

    def restore_handler(self) -> None:
        """Give SIGTERM back to whoever had it."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.is_between_generations() or state.global_step >= state.max_steps:
            return
        accelerator = self.trainer.accelerator
        requests = accelerator.reduce(torch.tensor([float(self.requested)], device=accelerator.device))
        if requests.item() > 0:
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.trainer.finish_checkpoint()


class SafeExitMixin:
    """Sealed checkpoints and a clean stop on SIGTERM, for a `GRPOTrainer` subclass (named before it in the bases)."""

    def __init__(self, model, reward_funcs, args, *more, **kwargs):
        if args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True would write a checkpoint inside a generation batch on SIGTERM; leave it "
                "False: SIGTERM is answered with a checkpoint at the end of the batch."
            )
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        self._checkpoint_to_push: str | None = None
        self._revisions: RevisionPushes | None = None
        if args.push_revisions and self.is_world_process_zero():
            self._revisions = RevisionPushes(HfApi(token=args.hub_token), self.hub_model_id)
        self._safe_exit = SafeExitCallback(self)
        self.add_callback(self._safe_exit)

    def is_between_generations(self) -> bool:
        """Whether the last update of a generation batch was made, so that a checkpoint repeats no prompt on resume."""
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) == 0

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed from its last checkpoint: the parent would go one on
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / SEAL).unlink(missing_ok=True)  # a run that was resumed from further back writes it anew
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder):
        self._checkpoint_to_push = checkpoint_folder  # pushed once it is sealed, so with the method's own state

    def finish_checkpoint(self) -> None:
        """Seal the checkpoint of this step, then remove old ones and start its upload. Every rank calls it."""
        output_dir = self._get_output_dir(trial=None)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = f"{output_dir}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self._revisions is not None:
                add_card(output_dir, folder)
            seal_checkpoint(folder)
            kept = [folder, self.state.best_model_checkpoint]
            if self._revisions is not None:
                self._revisions.start(folder, self.state.global_step)
                kept += self._revisions.folders
            remove_old_checkpoints(output_dir, self.args.save_total_limit, [path for path in kept if path])
        if self._checkpoint_to_push is not None:
            super()._push_from_checkpoint(self._checkpoint_to_push)
            self._checkpoint_to_push = None

    def train(self, *args, **kwargs):
        """Train.

        Raises:
            TrainingInterrupted: after SIGTERM, when the checkpoint is written.
        """
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._safe_exit.restore_handler()
            if self._revisions is not None:
                self._revisions.finish()
        if self._safe_exit.interrupted:
            step = self.state.global_step
            self.accelerator.print(f"Stopped by SIGTERM after step {step}; launch the same command again to go on.")
            raise TrainingInterrupted(step)
        return output
