"""What of AttnRL outlives a training step: the stream of prompts, how many are drawn, what was counted."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .config import AttnRLConfig
from .exploration import PromptBatchController, RunningMean


# What is counted over a run, on each rank: completions and their tokens; prompt tokens that they were sampled from;
# tokens without a sampling log-prob; completions that no reward function could score; completions without a token;
# prompts without a completion that could be scored.
COUNTERS = (
    "samples",
    "generated_tokens",
    "context_tokens",
    "missing_sampling_logps",
    "unscorable",
    "empty",
    "unscorable_prompts",
)


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
    State of the one-step off-policy pipeline. Rollouts in flight are not kept: a resumed run samples them again, and
    what was counted of them is added once their batch is trained.

    Args:
        args: settings of the run.
        num_prompts: prompts in the data set.

    Attributes:
        stream: where prompts come from.
        limit: prompts that are drawn in all, where `num_train_epochs` ends the run; `None` where `max_steps` does.
        controller: how many are drawn.
        easy_influence: running mean of the influence of solved prompts (eq. 8).
        batches_trained: index of the current policy: generation batches it was trained on.
        empty_batches: generation batches without a row to train on.
        passes_ended: passes that were seen to end.
        in_flight: first draw and number of draws of the batch that was sampled ahead.
        counters: what this rank counted of the batches that were used.
        ahead: what it counted of the one in flight.
        totals: what all ranks had counted as of the latest batch.
    """

    def __init__(self, args: AttnRLConfig, num_prompts: int):
        self.stream = PromptStream(num_prompts, args.seed, shuffle=args.shuffle_dataset is not False)
        self.limit = None if args.max_steps > 0 else math.ceil(args.num_train_epochs * num_prompts)
        self.controller = PromptBatchController(
            args.generation_batch_size,
            args.prompt_batch,
            smoothing=args.prompt_batch_smoothing,
            rounding=args.prompt_batch_rounding,
            max_size=round(args.prompt_batch * args.max_prompt_batch_factor),
        )
        self.easy_influence = RunningMean()
        self.batches_trained = 0
        self.empty_batches = 0
        self.passes_ended = 0
        self.in_flight: tuple[int, int] | None = None
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.ahead = dict.fromkeys(COUNTERS, 0)
        self.totals = dict(self.counters)

    def draw_batch(self) -> list[Draw]:
        """Prompts of the next batch, which is in flight from now on; none where the last one is drawn."""
        left = self.controller.size if self.limit is None else self.limit - self.stream.next_serial
        count = min(self.controller.size, left)
        self.in_flight = (self.stream.next_serial, count) if count > 0 else None
        return self.stream.draw(max(count, 0))

    def first_batch(self) -> list[Draw]:
        """Prompts of a batch that is not sampled yet: on resume those that were in flight."""
        return self.draw_batch() if self.in_flight is None else self.stream.draws(*self.in_flight)

    @property
    def prompts_used(self) -> int:
        """Prompts drawn, those in flight left out."""
        return self.stream.next_serial if self.in_flight is None else self.in_flight[0]

    @property
    def is_exhausted(self) -> bool:
        """Whether the run's last prompt was used."""
        return self.limit is not None and self.prompts_used >= self.limit

    @property
    def passes(self) -> float:
        """Passes over the prompts so far."""
        return self.prompts_used / self.stream.size

    def ends_pass(self) -> bool:
        """Whether a pass has ended since the last time that this was asked."""
        before, self.passes_ended = self.passes_ended, self.prompts_used // self.stream.size
        return self.passes_ended > before

    def land(self) -> None:
        """Count what was in flight: its batch is used now."""
        for name in COUNTERS:
            self.counters[name] += self.ahead[name]
        self.ahead = dict.fromkeys(COUNTERS, 0)

    def set_totals(self, totals: Sequence[int]) -> None:
        """Take up what all ranks counted, in the order of `COUNTERS`."""
        self.totals = dict(zip(COUNTERS, totals, strict=True))

    def state_dict(self) -> dict:
        """JSON types."""
        return {
            "batches_trained": self.batches_trained,
            "empty_batches": self.empty_batches,
            "next_serial": self.stream.next_serial,
            "in_flight": self.in_flight,
            "easy_influence": self.easy_influence.state_dict(),
            "controller": self.controller.state_dict(),
            "counters": self.totals,
        }

    def load_state_dict(self, state: dict, is_first_rank: bool) -> None:
        """Take up a state; what all ranks had counted is the first rank's from now on."""
        self.batches_trained = state["batches_trained"]
        self.empty_batches = state["empty_batches"]
        self.stream.next_serial = state["next_serial"]
        self.in_flight = tuple(state["in_flight"]) if state["in_flight"] else None
        self.passes_ended = self.prompts_used // self.stream.size
        self.easy_influence.load_state_dict(state["easy_influence"])
        self.controller.load_state_dict(state["controller"])
        self.totals = dict(state["counters"])
        self.counters, self.ahead = (dict.fromkeys(COUNTERS, 0) for _ in range(2))
        if is_first_rank:
            self.counters.update(state["counters"])
