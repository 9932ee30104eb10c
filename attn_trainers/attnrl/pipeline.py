"""What of AttnRL outlives a training step: the stream of prompts, how many are drawn, what was counted."""

import random
from dataclasses import dataclass

from .config import AttnRLConfig
from .exploration import PromptBatchController, RunningMean


# What is counted over a run, on each rank.
COUNTERS = ("samples", "generated_tokens", "missing_sampling_logps", "unscorable")


@dataclass(frozen=True)
class Draw:
    """One prompt drawn from the data: the number of the draw since the start of training, and the data set index."""

    serial: int
    index: int


class PromptStream:
    """An endless, shuffled sequence of data set indices whose whole state is a count.

    Draw s is entry s mod size of the permutation of epoch s div size, so that a resumed run, and a run on any number
    of ranks, draws the same prompts.

    Args:
        size: number of prompts in the data set.
        seed: seed of the permutations.
        shuffle: `False` keeps the data set's order in each epoch.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError(
                f"train_dataset has {size} prompts; at least 1 is needed. Check the data and its filters."
            )
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.next_serial = 0
        self._epoch, self._order = -1, range(size)

    def draw(self, count: int) -> list[Draw]:
        """The next `count` prompts."""
        first, self.next_serial = self.next_serial, self.next_serial + count
        return self.draws(first, count)

    def draws(self, first: int, count: int) -> list[Draw]:
        """The draws `first` to `first + count - 1`, whether made already or not."""
        return [Draw(serial, self._index(serial)) for serial in range(first, first + count)]

    def _index(self, serial: int) -> int:
        epoch, position = divmod(serial, self.size)
        if epoch != self._epoch:
            order = list(range(self.size))
            if self.shuffle:
                random.Random(f"{self.seed}/prompts/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[position]


class Pipeline:
    """
    State of the one-step off-policy pipeline. Rollouts in flight are not kept: a resumed run samples them again.

    Args:
        args: settings of the run.
        num_prompts: prompts in the data set.

    Attributes:
        stream: where prompts come from.
        controller: how many are drawn.
        easy_influence: running mean of the influence of solved prompts (eq. 8).
        batches_trained: index of the current policy: training batches behind it.
        in_flight: first draw and number of draws of the batch that was sampled ahead.
        counters: what this rank counted.
        totals: what all ranks had counted as of the latest training batch.
    """

    def __init__(self, args: AttnRLConfig, num_prompts: int):
        self.stream = PromptStream(num_prompts, args.seed, shuffle=args.shuffle_dataset is not False)
        prompt_batch = args.generation_batch_size // args.num_generations
        self.controller = PromptBatchController(
            args.generation_batch_size,
            prompt_batch,
            smoothing=args.prompt_batch_smoothing,
            rounding=args.prompt_batch_rounding,
            max_size=round(prompt_batch * args.max_prompt_batch_factor),
        )
        self.easy_influence = RunningMean()
        self.batches_trained = 0
        self.in_flight: tuple[int, int] | None = None
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.totals = dict(self.counters)

    def draw_batch(self) -> list[Draw]:
        """Prompts of the next batch, which is in flight from now on."""
        self.in_flight = (self.stream.next_serial, self.controller.size)
        return self.stream.draw(self.controller.size)

    def first_batch(self) -> list[Draw]:
        """Prompts of a batch that is not sampled yet: on resume those that were in flight."""
        return self.draw_batch() if self.in_flight is None else self.stream.draws(*self.in_flight)

    def state_dict(self) -> dict:
        """JSON types."""
        return {
            "batches_trained": self.batches_trained,
            "next_serial": self.stream.next_serial,
            "in_flight": self.in_flight,
            "easy_influence": self.easy_influence.state_dict(),
            "controller": self.controller.state_dict(),
            "counters": self.totals,
        }

    def load_state_dict(self, state: dict, is_first_rank: bool) -> None:
        """Take up a state; what all ranks had counted is the first rank's from now on."""
        self.batches_trained = state["batches_trained"]
        self.stream.next_serial = state["next_serial"]
        self.in_flight = tuple(state["in_flight"]) if state["in_flight"] else None
        self.easy_influence.load_state_dict(state["easy_influence"])
        self.controller.load_state_dict(state["controller"])
        self.totals = dict(state["counters"])
        if is_first_rank:
            self.counters.update(state["counters"])
