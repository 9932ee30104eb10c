"""Progress bars of a trainer's long steps: one at a time under the training's own, on the first rank's terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from tqdm.auto import tqdm

from ..rewards.pool import showing_grading


class ProgressMixin:
    """Bars for a `GRPOTrainer` subclass (named before it in the bases), for what TRL samples and scores too."""

    @property
    def shows_progress(self) -> bool:
        """Whether there are bars: on the first rank's terminal, where one is, and not with `disable_tqdm`."""
        return self.accelerator.is_main_process and not self.args.disable_tqdm and sys.stderr.isatty()

    def progress(self, items: Iterable | None, what: str, total: int | None = None, unit: str = "it") -> tqdm:
        """The items, with a bar that goes when they are done; without items, a bar to be told of progress.

        Args:
            items: what is gone through.
            what: is done with them.
            total: number of items, where they do not tell it.
            unit: what an item is.
        """
        hidden = not self.shows_progress
        return tqdm(items, desc=what, total=total, unit=unit, leave=False, dynamic_ncols=True, disable=hidden)

    def _calculate_rewards(self, *args, **kwargs):
        if not self.shows_progress:
            return super()._calculate_rewards(*args, **kwargs)
        functions = self.reward_funcs
        self.reward_funcs = self.progress(functions, "Reward functions")  # TRL goes through them once
        try:
            with showing_grading(lambda total: self.progress(None, "Grading", total)):
                return super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions

    def _generate_single_turn(self, *args, **kwargs):
        with self._showing_generation():
            return super()._generate_single_turn(*args, **kwargs)

    def _showing_generation(self):
        """Context in which the one call by which TRL samples shows a bar; a server's samples show their own."""
        if not self.shows_progress or self.use_transformers_continuous_batching:
            return nullcontext()
        if self.use_vllm:
            colocate = self.args.vllm_mode == "colocate"
            return self._showing_requests(self.vllm_generation.llm) if colocate else nullcontext()
        if self.generation_config.cache_implementation is not None:
            return nullcontext()  # forwards may be compiled, and a hook would break them up
        return self._showing_forwards(self.accelerator.unwrap_model(self.model))

    @contextmanager
    def _showing_forwards(self, model: nn.Module) -> Iterator[None]:
        """A bar of the tokens that each completion has: `generate` makes a forward for each."""
        with self.progress(None, "Sampling", self.max_completion_length, "token") as bar:

            def count(*_) -> None:  # what a hook returns would stand in for the output
                bar.update()

            hook = model.register_forward_hook(count)
            try:
                yield
            finally:
                hook.remove()

    @contextmanager
    def _showing_requests(self, llm) -> Iterator[None]:
        """A bar of the completions that are done: vLLM draws it where it is given one, and TRL gives it none."""
        generate = llm.generate

        def bar(items=None, total=None, **_):
            return self.progress(None, "Sampling", total) if items is None else items  # the latter are prompts

        llm.generate = lambda *args, **kwargs: generate(*args, **kwargs | {"use_tqdm": bar})
        try:
            yield
        finally:
            del llm.generate
