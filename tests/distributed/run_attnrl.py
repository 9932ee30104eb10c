"""Trains AttnRL for three generation batches, with a credit method on request, and writes what happened; launched by
test_attnrl.py and test_attnrl_credit.py on one or two ranks.

The completions are given, or sampled by vLLM; all that follows is the trainer's own.
"""

import json
import random
from pathlib import Path

from accelerate.utils import gather_object
from common import SETTINGS, history, odd_sum, run, train_and_save
from transformers import PreTrainedTokenizerFast

from attn_trainers import AttnRLConfig, AttnRLTrainer
from attn_trainers.attnpo.method import AttnPOCredit
from attn_trainers.attnpo.options import AttnPOOptions
from attn_trainers.attnrl.rollouts import branches_of
from attn_trainers.rhythm.method import RhythmCredit
from attn_trainers.rhythm.options import RhythmOptions
from attn_trainers.sampling.requests import GeneratedTokens
from attn_trainers.tiny.arithmetic import sample_problems
from attn_trainers.tiny.runs import to_dataset


ROWS_PER_MICRO_BATCH = 12
EOS, CLOSE, BLANK = 1, 4, 5  # <eos>, </think> and the blank line of the arithmetic tokenizer
CREDITS = {
    "none": lambda: None,
    "rhythm": lambda: RhythmCredit(RhythmOptions(scheme="coupled", fai_min_distance=2, head_pool="all")),
    "attnpo": lambda: AttnPOCredit(AttnPOOptions(heads=[[0, 0], [1, 1]], step_mode="paragraphs", min_step_chars=0)),
}


class RecordingTrainer(AttnRLTrainer):
    """Counts forwards and backwards, and keeps the prompts of each batch, and advantages and factors of its rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.rows, self.forwards, self.losses = [], [], 0, 0

    def _training_micro_batches(self, prompts, num_drawn):
        self.batches.append(prompts)
        return super()._training_micro_batches(prompts, num_drawn)

    def _assign_credit(self, parts, facts):
        super()._assign_credit(parts, facts)
        own = [
            (key, [batch[name][i, : sum(batch["completion_mask"][i])].tolist() for name in ("advantages", "credit")])
            for (batch, _), known in zip(parts, facts, strict=True)
            for i, key in enumerate(known.keys)
            if key
        ]
        self.rows.append(dict(gather_object(own)))

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.forwards += 1
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        self.losses += 1
        return super()._compute_loss(model, inputs)


class GivenCompletions(RecordingTrainer):
    """Hands out numbers in paragraphs, an end of thinking and an answer: a function of the request."""

    def generate_requests(self, requests):
        return [GeneratedTokens(self._written(request)) for request in requests]

    def _written(self, request) -> list[int]:
        rng = random.Random(f"{request.prompt_ids}/{request.seed}")
        tokens = [BLANK if i % 3 == 2 else rng.randint(13, 200) for i in range(rng.choice([6, 9]))]
        tokens += [CLOSE] * (CLOSE not in request.prompt_ids) + [rng.randint(13, 200), rng.randint(13, 200), EOS]
        return tokens[: request.max_tokens]


def main(model_dir: str, output: str, num_ranks: int, use_vllm: bool, credit: str = "none") -> None:
    args = AttnRLConfig(
        **SETTINGS,
        output_dir=str(Path(output).parent / "out"),
        per_device_train_batch_size=ROWS_PER_MICRO_BATCH // num_ranks,
        steps_per_generation=4,
        num_rollouts=4,
        rollouts_per_branch=1,
        max_steps=6,
        learning_rate=0.1,
        max_grad_norm=100.0,  # the backends clip with different small constants
        epsilon=10.0,  # no ratio is clipped: a token on the edge would turn rounding into a jump
        epsilon_high=10.0,
        delta=20.0,
        max_completion_length=16,
        min_branch_spacing=0,
        influence_delta=1,
        seeded_sampling=True,
        use_vllm=use_vllm,
    )
    trainer_class = RecordingTrainer if use_vllm else GivenCompletions
    trainer = trainer_class(
        model_dir,
        odd_sum,
        args,
        train_dataset=to_dataset(sample_problems(24, seed=0)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_dir),
        credit=CREDITS[credit](),
    )
    train_and_save(trainer, output, num_ranks)
    work = gather_object([[trainer.forwards, trainer.losses]])
    if trainer.accelerator.is_main_process:
        batches = [
            [
                [
                    p.draw.serial,
                    [
                        [
                            r.tokens.tolist(),
                            r.reward,
                            [[c.offset, c.tokens.tolist(), c.reward] for c in branches_of(r)],
                        ]
                        for r in p.rollouts
                    ],
                ]
                for p in prompts
            ]
            for prompts in trainer.batches
        ]
        state = trainer.pipeline.state_dict()
        seen = {"batches": batches, "state": state, "work": work, "rows": trainer.rows}
        seen["history"] = history(trainer, "attnrl/", f"{credit}/")
        Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    run(main)
