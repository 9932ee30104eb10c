"""A small random model with problems, and a probe of it."""

import json

import pytest

from attn_trainers.tiny.arithmetic import sample_problems


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    problems = sample_problems(3, seed=5)
    path.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))
    return path


@pytest.fixture
def probe_fields(tiny_model_dir, problem_file, tmp_path) -> dict:
    """Settings of a probe that takes seconds."""
    return {
        "model": str(tiny_model_dir),
        "data": str(problem_file),
        "output_dir": str(tmp_path / "out"),
        "prompt_template": "{problem}",
        "num_rollouts": 1,
        "max_completion_length": 24,
        "min_branch_spacing": 0,
        "influence_delta": 1,
        "backend": "transformers",
        "seed": 3,
    }
