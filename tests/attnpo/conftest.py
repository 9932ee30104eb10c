"""A trainer whose completions are given: one rank, no sampling, everything after the sampling real."""

import random
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from attn_trainers.tiny.arithmetic import Problem, build_model, build_tokenizer, prompt_messages, sample_problems


@dataclass
class FixedCompletions:
    """The completions of each prompt, by its text."""

    tokenizer: object
    texts: dict[str, list[str]]

    def draw(self, prompt_ids: list[list[int]], first_row: int) -> list[list[int]]:
        """Completions of consecutive rows of a global batch in which the G rows of a prompt follow each other."""
        completions = []
        for row, ids in enumerate(prompt_ids, start=first_row):
            texts = self.texts[self.tokenizer.decode(ids).removesuffix("<think>")]
            completions.append(self.tokenizer(texts[row % len(texts)])["input_ids"])
        return completions


def solution(problem: Problem, rechecks: int, wrong: bool = False, slip: int = 0) -> str:
    """A solution with re-checks after its first steps.

    Args:
        problem: what is solved.
        rechecks: number of steps that are checked again.
        wrong: whether the answer is not what the last step says.
        slip: error of the last step.
    """
    value, parts = problem.start, []
    for index, op in enumerate(problem.operations):
        result = value + op + slip * (index == len(problem.operations) - 1)
        step = f"{value} {'+' if op > 0 else '-'} {abs(op)} = {result}"
        parts += [step] + [f"Wait, let me check: {step}"] * (rechecks > index)
        value = result
    return "\n\n".join(parts) + f"\n\n</think>\\boxed{{{value + wrong}}}<eos>"


@pytest.fixture(scope="session")
def solution_of():
    return solution


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return sample_problems(4, seed=5, num_operations=2)


@pytest.fixture(scope="session")
def dataset(problems) -> Dataset:
    return Dataset.from_list([{"prompt": prompt_messages(p), "answer": p.answer} for p in problems])


@pytest.fixture(scope="session")
def sharp_model_dir(build_sharp_model):
    return build_sharp_model(hidden_size=64, num_layers=2, sharpness=16.0)


@pytest.fixture
def model(sharp_model_dir):
    return AutoModelForCausalLM.from_pretrained(sharp_model_dir).train()


@pytest.fixture(scope="session")
def doubtful(tokenizer, problems, tmp_path_factory):
    """Folder of a model that solves `problems` with re-checks, one time in three right, and boxes its last result.

    So its answer hangs on that step, as it would not if the problem alone gave it away.
    """
    torch.manual_seed(0)
    rng = random.Random(0)
    model = build_model(tokenizer, hidden_size=64, num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        slips = rng.choices([0, 1, 2, 3, 4, 5, 6, 7, 8], weights=[4] + [1] * 8, k=24)
        texts = [
            problem.text + "<think>" + solution(problem, rng.randint(0, 2), slip=slip)
            for problem, slip in zip(problems * 6, slips, strict=True)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("doubtful")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mix(tokenizer):
    """Per prompt: short and right, long and right, one re-check and wrong, one re-check and right; some all right."""

    def make(problems: list[Problem], all_right: list[int]) -> FixedCompletions:
        return FixedCompletions(
            tokenizer,
            {
                problem.text: [
                    solution(problem, 0),
                    solution(problem, 2),
                    solution(problem, 1, wrong=index not in all_right),
                    solution(problem, 1),
                ]
                for index, problem in enumerate(problems)
            },
        )

    return make


@pytest.fixture
def mixed(mix, problems) -> FixedCompletions:
    return mix(problems, all_right=[3])


@pytest.fixture
def make_fixed():
    """Subclass of a trainer whose sampling hands out given completions."""

    def make(trainer_class: type, completions: FixedCompletions) -> type:
        class Fixed(trainer_class):
            def _generate_single_turn(self, prompt_ids, *args, **kwargs):
                first_row = self.accelerator.process_index * len(prompt_ids)
                return completions.draw(prompt_ids, first_row), None

        return Fixed

    return make
