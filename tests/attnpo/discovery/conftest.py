"""A labelled response and what asks for its prompt."""

import pytest

from attn_trainers.attnpo.alignment import reasoning_step_ranges
from attn_trainers.attnpo.discovery.probing import Candidate
from attn_trainers.attnpo.steps import split_paragraphs


@pytest.fixture
def prompt_ids(tokenizer):
    return lambda problem: tokenizer(problem.text + "<think>")["input_ids"]


@pytest.fixture
def candidate(tokenizer, problems, solution_of) -> Candidate:
    """Four steps: first result, its re-check, the answer, its re-check."""
    problem = problems[0]
    ids = tokenizer(solution_of(problem, 2))["input_ids"]
    return Candidate(
        problem.text, problem.answer, ids, reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
    )
