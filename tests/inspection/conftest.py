"""A small model, two responses of it, and what an inspection sees in them."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from attn_trainers.attnpo.steps import split_paragraphs
from attn_trainers.attnrl.steps import StepDelimiters
from attn_trainers.inspection.measure import InspectionSettings, inspect_response


SOLUTION = "\n\n".join(["17 + 3 = 20", "20 - 4 = 16", "16 + 9 = 25", "25 - 1 = 24", "24 + 5 = 29"])


@pytest.fixture(scope="package")
def completions() -> list[str]:
    """A right and a wrong answer, each of five steps of thinking."""
    return [SOLUTION + "\n\n</think>\\boxed{29}", SOLUTION.replace(" = 29", " = 30") + "\n\n</think>\\boxed{30}"]


@pytest.fixture(scope="package")
def key_focus_heads() -> tuple:
    return ((1, 0), (2, 3))


@pytest.fixture(scope="package")
def model_dir(build_sharp_model) -> Path:
    return build_sharp_model(hidden_size=128, num_layers=3)


@pytest.fixture(scope="package")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture(scope="package")
def prompt_ids(tiny_tokenizer) -> list[int]:
    return tiny_tokenizer("17 + 3 - 4 + 9 - 1 + 5<think>")["input_ids"]


@pytest.fixture(scope="package")
def delimiters(tiny_tokenizer) -> StepDelimiters:
    return StepDelimiters.from_tokenizer(tiny_tokenizer)


@pytest.fixture(scope="package")
def inspected(model, tiny_tokenizer, prompt_ids, completions, key_focus_heads, delimiters):
    settings = InspectionSettings(influence_delta=2, key_focus_heads=key_focus_heads, splitter=split_paragraphs)
    return [
        inspect_response(
            model,
            tiny_tokenizer,
            prompt_ids,
            tiny_tokenizer(text)["input_ids"],
            settings,
            delimiters,
            problem=f"<problem {index}> & more",
            correct=index == 0,
        )
        for index, text in enumerate(completions)
    ]
