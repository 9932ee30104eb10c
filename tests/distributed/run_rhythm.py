"""Trains Rhythm for three generation batches and writes what happened; launched by test_rhythm.py on one or two ranks.

The completions are given, or sampled by vLLM; all that follows is the trainer's own. Heads are calibrated on the
second batch, so the first has credit factors alone, the second reads attention twice, the third once.
"""

import json
import random
from pathlib import Path

from accelerate.utils import gather_object
from common import SETTINGS, history, odd_sum, run, train_and_save
from transformers import PreTrainedTokenizerFast

from attn_trainers import RhythmConfig, RhythmTrainer
from attn_trainers.tiny.arithmetic import sample_problems
from attn_trainers.tiny.runs import to_dataset


GROUP = 4
ROWS = 24  # the third group of each half lies on both ranks


class RecordedTrainer(RhythmTrainer):
    """Keeps the head sets of each batch, and the factors and advantages of its rows from all ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches_seen = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(dim=1).tolist()
        advantages = output["advantages"]
        advantages = advantages[:, None].expand_as(output["credit"]) if advantages.dim() == 1 else advantages
        rows = [
            [factors[:n].tolist(), advantage[:n].tolist()]
            for factors, advantage, n in zip(output["credit"], advantages, lengths, strict=True)
        ]
        self.batches_seen.append(
            {
                "rows": gather_object(rows),
                "heads": self.last_credit.details.heads[0],
                "calibrated": self.credit.calibration.heads,
            }
        )
        return output


class GivenCompletions(RecordedTrainer):
    """Hands out random tokens, a function of the prompt and the row's place in its group."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, first_row = [], self.accelerator.process_index * len(prompt_ids)
        for row, ids in enumerate(prompt_ids, start=first_row):
            rng = random.Random(f"{ids}/{row % GROUP}")
            completions.append([rng.randint(10, 200) for _ in range(rng.randint(12, 40))])
        return completions, None


def main(model_dir: str, output: str, num_ranks: int, use_vllm: bool) -> None:
    args = RhythmConfig(
        **SETTINGS,
        output_dir=str(Path(output).parent / "out"),
        scheme="coupled",
        rhythm_lambda=0.1,
        reward_mode="token",
        calibration_responses=ROWS + 1,
        per_device_train_batch_size=ROWS // 2 // num_ranks,
        num_generations=GROUP,
        max_steps=3,
        learning_rate=0.5,
        max_completion_length=40,
        use_vllm=use_vllm,
    )
    trainer_class = RecordedTrainer if use_vllm else GivenCompletions
    trainer = trainer_class(
        model_dir,
        odd_sum,
        args=args,
        train_dataset=to_dataset(sample_problems(24, seed=0, num_operations=3)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_dir),
    )
    train_and_save(trainer, output, num_ranks)
    if trainer.accelerator.is_main_process:
        seen = {"history": history(trainer, "rhythm/"), "batches": trainer.batches_seen}
        Path(output).write_text(json.dumps(seen))


if __name__ == "__main__":
    run(main)
