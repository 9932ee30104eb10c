"""Trains AttnPO for two generation batches and writes what happened; launched by test_attnpo.py on one or two ranks.

The completions are given, or sampled by vLLM; all that follows is the trainer's own.
"""

import json
import random
from pathlib import Path

from common import SETTINGS, history, odd_sum, run, train_and_save
from transformers import PreTrainedTokenizerFast

from attn_trainers import AttnPOConfig, AttnPOTrainer
from attn_trainers.tiny.arithmetic import sample_problems, write_solution
from attn_trainers.tiny.runs import exact_answer_reward, to_dataset


GROUP = 4
ROWS = 24  # the third and the ninth group lie on both ranks


class GivenCompletions(AttnPOTrainer):
    """Hands out solutions of a noisy teacher, the G of a prompt in order wherever its rows lie."""

    def __init__(self, *args, problems, **kwargs):
        super().__init__(*args, **kwargs)
        self.solutions = {
            problem.text: [
                write_solution(problem, random.Random(f"{problem.text}/{i}"), noise=0.1, recheck=0.5)
                for i in range(GROUP)
            ]
            for problem in problems
        }

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, first_row = [], self.accelerator.process_index * len(prompt_ids)
        for row, ids in enumerate(prompt_ids, start=first_row):
            text = self.solutions[self._tokenizer.decode(ids).removesuffix("<think>")][row % GROUP]
            completions.append(self._tokenizer(text + self._tokenizer.eos_token)["input_ids"])
        return completions, None


def main(model_dir: str, output: str, num_ranks: int, use_vllm: bool) -> None:
    args = AttnPOConfig(
        **SETTINGS,
        output_dir=str(Path(output).parent / "out"),
        heads=[[0, 0], [1, 1]],
        step_mode="paragraphs",
        schedule_fraction=0.5,
        per_device_train_batch_size=ROWS // 2 // num_ranks,
        num_generations=GROUP,
        max_steps=2,
        learning_rate=0.5,
        max_completion_length=24 if use_vllm else 128,
        use_vllm=use_vllm,
    )
    problems = sample_problems(24, seed=0, num_operations=3)
    settings = {
        "args": args,
        "train_dataset": to_dataset(problems),
        "processing_class": PreTrainedTokenizerFast.from_pretrained(model_dir),
    }
    if use_vllm:
        trainer = AttnPOTrainer(model_dir, odd_sum, **settings)
    else:
        trainer = GivenCompletions(model_dir, exact_answer_reward, problems=problems, **settings)
    train_and_save(trainer, output, num_ranks)
    if trainer.accelerator.is_main_process:
        Path(output).write_text(json.dumps(history(trainer, "attnpo/")))


if __name__ == "__main__":
    run(main)
