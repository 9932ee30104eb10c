"""Initial rollouts that a server samples while the batch before them is scored and trained."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.server import PendingSamples
from ..sampling.requests import GenerationRequest
from .collection import BranchPlan
from .pipeline import Draw
from .rollouts import PromptRollouts


@dataclass
class RolloutsAhead:
    """Rollouts that are being sampled.

    Attributes:
        prompts: this rank's, without rollouts yet.
        requests: one per rollout.
        pending: where their samples will be.
        policy: number of training batches that the sampling policy had been trained on.
    """

    prompts: list[PromptRollouts]
    requests: list[GenerationRequest]
    pending: PendingSamples
    policy: int


class OverlapMixin:
    """
    Sampling beside training, for `AttnRLTrainer` with a vLLM server.

    The new rollouts are sent with the continuations, but only these are waited for. The rollouts land before the first
    optimizer step on the batch: their attention and old log-probs are read with the weights that sampled them, so that
    a seeded run has the same samples as one that waits.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._flying: RolloutsAhead | None = None

    @property
    def overlaps_sampling(self) -> bool:
        """Whether training goes on while a server samples."""
        return self.args.overlap_sampling and self.use_vllm and self.args.vllm_mode == "server"

    def _sample_beside_training(self, plan: BranchPlan, draws: Sequence[Draw]) -> None:
        """As `_sample`, but the new prompts come from `_land_ahead`."""
        new = self._tokenize_draws(draws[self.ranks.index :: self.ranks.count])
        slots, continuing = self._all_slots(plan), list(self._continuation_requests(plan))
        starting = list(self._initial_requests(new))
        with self.timed("generate"):
            now = self.submit_requests(continuing)
            ahead = self.submit_requests(starting)
            self._flying = RolloutsAhead(new, starting, ahead, self.pipeline.batches_trained)
            sampled = self.collect_requests(now)
        with self.timed("reward"):
            rewards, extras = self._score(self._whole_continuations(slots, sampled))
        self._count(self.pipeline.counters, continuing, sampled, rewards)
        self._attach_continuations(plan, slots, self._samples(sampled, rewards, extras, self._flying.policy))

    def _land_ahead(self) -> None:
        """Wait for the rollouts that are sampled ahead, score and read them; nothing where none are."""
        flying, self._flying = self._flying, None
        if flying is None:
            return
        start = time.monotonic()
        sampled = self.collect_requests(flying.pending)
        waited = time.monotonic() - start
        with self.timed("reward"):
            rewards, extras = self._score(self._whole_rollouts(flying.prompts, sampled))
        self._count(self.pipeline.ahead, flying.requests, sampled, rewards)
        samples = self._samples(sampled, rewards, extras, flying.policy)
        self._ahead = self._attach_rollouts(flying.prompts, samples, reads=True)
        self.log_values({"seconds/waited": waited, "seconds/ahead": flying.pending.seconds}, self.metric_prefix)
