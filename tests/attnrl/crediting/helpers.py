"""Trainers, credit methods and weights that the tests of credit on trees share."""

import random
from pathlib import Path

import torch
from torch import Tensor

from attn_trainers import AttnRLTrainer
from attn_trainers.attention import RhythmObserver
from attn_trainers.attnpo.method import AttnPOCredit
from attn_trainers.attnpo.options import AttnPOOptions
from attn_trainers.base.credit import BatchCredit, CreditMethod
from attn_trainers.rhythm.method import RhythmCredit
from attn_trainers.rhythm.options import RhythmOptions
from attn_trainers.sampling.requests import GeneratedTokens


EOS, CLOSE, BLANK = 1, 4, 5  # <eos>, </think> and the blank line of the arithmetic tokenizer
HEADS = [[0, 0], [1, 1]]


def odd_sum(completions, completion_ids, **kwargs):
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def written(request, rng: random.Random) -> list[int]:
    """Numbers in paragraphs, an end of thinking where the head has none yet, an answer and the end."""
    tokens = [BLANK if i % 3 == 2 else rng.randint(13, 200) for i in range(rng.choice([6, 9, 12]))]
    if CLOSE not in request.prompt_ids:
        tokens.append(CLOSE)
    tokens += [rng.randint(13, 200) for _ in range(rng.randint(1, 3))] + [EOS]
    return tokens[: request.max_tokens]


class RecordingTrainer(AttnRLTrainer):
    """Keeps the micro-batches of each generation batch, and each loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.losses = [], []

    def _training_micro_batches(self, prompts, num_drawn):
        updates = super()._training_micro_batches(prompts, num_drawn)
        self.batches.append([batch for update in updates for batch in update])
        return updates

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss


class WritingTrainer(RecordingTrainer):
    """Writes completions with steps and an answer; they hang on torch's random state, as sampled ones do."""

    def generate_requests(self, requests):
        seeds = torch.randint(2**31, (len(requests),)).tolist()
        return [
            GeneratedTokens(written(request, random.Random(seed)))
            for request, seed in zip(requests, seeds, strict=True)
        ]


class Ones(CreditMethod):
    """Factors that change nothing, with or without a look at attention."""

    prefix = "ones"

    def __init__(self, observes: bool):
        self.observes, self.profiles = observes, []

    def observer(self, batch):
        return RhythmObserver(batch.attention_mask, batch.prompt_lengths, [0, 1]) if self.observes else None

    def factors(self, passes, advantages, facts, context):
        if self.observes:
            self.profiles += [profile for signal in passes for profile in signal.observer.result()]
        return BatchCredit(factors=[torch.ones_like(values) for values in advantages])


def attnpo(**options) -> AttnPOCredit:
    settings = {"heads": HEADS, "step_mode": "paragraphs", "min_step_chars": 0, "schedule_fraction": 0.0}
    return AttnPOCredit(AttnPOOptions(**(settings | options)))


def rhythm(**options) -> RhythmCredit:
    return RhythmCredit(RhythmOptions(**({"fai_min_distance": 2, "head_pool": "all"} | options)))


def weights(trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def first_checkpoint(folder: Path) -> str:
    """The earliest checkpoint: a save waits for the end of its generation batch."""
    return str(min(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])))
