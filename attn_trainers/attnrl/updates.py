"""A training loop whose generation batches are as many updates as they have rows for.

`transformers` makes each optimizer update of `gradient_accumulation_steps` batches of a data loader, and TRL each
generation batch of a fixed number of those. Here the data loader gives nothing but the beat: all micro-batches of an
update, however many, run in its last training step, and updates come from the generation batches that the trainer
makes as it needs them.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import SaveStrategy


# What a callback may ask for at any update, and gets at the end of the generation batch.
_HELD = ("should_save", "should_evaluate")


logger = logging.getLogger(__name__)

# Generation batches in a row without a row to train on, after which a step is let go by without an update, so that
# what they showed is logged and the run has an end.
MOST_EMPTY_BATCHES = 5

NO_ROWS = (
    "%d generation batches in a row gave no row to train on: the leaves of each prompt got the same reward, or none. "
    "A step goes by without an update. See in the log attnrl/solve_all_ratio and solve_none_ratio (data too easy or "
    "too hard, or a reward function that does not read the data set's answers), attnrl/unscorable (answers that it "
    "cannot parse), completions/clipped_ratio (max_completion_length too small for an answer) and "
    "attnrl/steps_per_rollout (rollouts of one step cannot be branched)."
)


def _no_inputs(_) -> dict:
    return {}


class UpdatesMixin:
    """Updates, passes and boundaries of `AttnRLTrainer`, which supplies `_next_training_batch` and `pipeline`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._updates: deque[list[dict[str, Tensor]]] = deque()  # of the current generation batch, not made yet
        self._held: set[str] = set()

    # ---- length of the run ------------------------------------------------------------------------------------------

    def _planned_updates(self) -> int:
        """Updates of the run at most: `max_steps`, or `num_train_epochs` passes in full generation batches."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        prompts = math.ceil(self.args.num_train_epochs * len(self.train_dataset))
        return math.ceil(prompts / self.args.prompt_batch) * self.args.updates_per_batch

    def get_train_dataloader(self):
        beats = self._planned_updates() * self.args.gradient_accumulation_steps
        return DataLoader(range(beats), batch_size=1, collate_fn=_no_inputs)

    def set_initial_training_values(self, args, dataloader):
        """As the parent's, for passes that end when their prompts are used, at an update nobody knows before."""
        updates, prompts = self._planned_updates(), len(self.train_dataset)
        rows = self.get_total_train_batch_size(args)
        passes = sys.maxsize if args.max_steps > 0 else math.ceil(args.num_train_epochs)
        return passes, updates, prompts, updates * rows, rows, updates * args.gradient_accumulation_steps, updates

    # ---- updates ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        return generation_batch if self.model.training else super()._prepare_inputs(generation_batch)

    def training_step(self, model, inputs, num_items_in_batch):
        """All micro-batches of an update in its last step, nothing in the others."""
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.accelerator.device)
        start = time.perf_counter()
        model.train()
        if not self._has_updates():
            self._current_train_step_time += time.perf_counter() - start
            return torch.zeros((), device=self.accelerator.device)
        micro_batches = self._updates.popleft()
        self._current_train_step_time += time.perf_counter() - start
        self._step, self.current_gradient_accumulation_steps = 0, len(micro_batches)
        losses = []
        for index, micro_batch in enumerate(self.progress(micro_batches, "Update")):
            if self._is_sharded and index == len(micro_batches) - 1:
                self._before_weights_change()  # DeepSpeed steps in its last backward
            with self._accumulating(model, is_last=index == len(micro_batches) - 1):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        if not self._is_sharded:
            self._before_weights_change()
        return torch.stack(losses).sum()

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _before_weights_change(self) -> None:
        """Called once in each update, while the weights are still those before it."""

    @contextmanager
    def _accumulating(self, model, is_last: bool) -> Iterator[None]:
        """Let ranks exchange gradients, and the optimizer step, after the last micro-batch only."""
        self.accelerator.sync_gradients = is_last
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        exchanges = is_last or each or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if exchanges else self.accelerator.no_sync(model=model):
            yield

    # ---- boundaries -------------------------------------------------------------------------------------------------

    def is_between_generations(self) -> bool:
        return not self._updates or self.state.global_step >= self.state.max_steps

    def _has_updates(self) -> bool:
        """Whether an update is left, sampling generation batches where none is; the same on all ranks."""
        self.model_wrapped.train()
        for _ in range(MOST_EMPTY_BATCHES):
            if not self._updates:
                self._updates.extend(self._next_training_batch())
            if self._updates or self.pipeline.is_exhausted:
                return bool(self._updates)
        if self.ranks.is_first:
            logger.warning(NO_ROWS, MOST_EMPTY_BATCHES)
        return False

    def _run_epoch(self, **kwargs):
        """A pass over the prompts; nothing where `num_train_epochs` leaves no prompt that gives a row."""
        # A resumed run takes up its random state later, before its first update: until then it must sample nothing.
        is_resumed = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
        looks_ahead = self.pipeline.limit is not None and not is_resumed
        goes_on = 0 < self.state.global_step < self.state.max_steps
        if looks_ahead and goes_on and self._is_used_up():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Log at any update; save and evaluate between generation batches, where a pass or the run may end too."""
        control, pipeline = self.control, self.pipeline
        self.state.epoch = pipeline.passes
        if not self.is_between_generations() and not control.should_training_stop:
            for name in _HELD:
                if getattr(control, name):
                    self._held.add(name)
                    setattr(control, name, False)
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        for name in self._held:
            setattr(control, name, True)
        self._held.clear()
        if pipeline.is_exhausted and not control.should_training_stop:
            self._stop()
        saves = control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if control.should_training_stop:
            self._updates.clear()  # what max_steps or a callback cut off
        if pipeline.ends_pass():
            control.should_epoch_stop = True
        elif pipeline.limit is not None and not control.should_training_stop and self._is_used_up():
            self._stop()
            control.should_save = control.should_save and not saves
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _is_used_up(self) -> bool:
        """Whether no prompt is left that gives an update, sampling the next one where there is none."""
        return not self._has_updates() and self.pipeline.is_exhausted

    def _stop(self) -> None:
        """End the run as `transformers` does at `max_steps`."""
        self.control.should_training_stop = True
        if self.args.save_strategy == SaveStrategy.STEPS:
            self.control.should_save = True
