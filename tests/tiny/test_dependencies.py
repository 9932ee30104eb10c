"""Dependency problems: generation, the teacher, and the truth of steps in closed form."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_trainers.tiny.dependencies import (
    Definition,
    DependencyProblem,
    ProblemSize,
    Teacher,
    build_dependency_tokenizer,
    sample_dependencies,
    write_dependencies,
)
from attn_trainers.tiny.truth import StepTruth, parse_problem, read_truth


# c = 4 + 9 = 3, d = c - a = 9, e = c + d = 2, u = d + b = 8; e is asked for.
PROBLEM = DependencyProblem(
    (
        Definition("e", "c", 1, "d"),
        ("a", 4),
        Definition("u", "d", 1, "b"),
        Definition("c", "a", 1, "b"),
        ("b", 9),
        Definition("d", "c", -1, "a"),
    ),
    "e",
)


def test_a_problem_knows_its_values_and_what_matters():
    assert PROBLEM.text == " e c + d; a4; u d + b; c a + b; b9; d c - a; e?"
    assert parse_problem(PROBLEM.text) == PROBLEM
    assert PROBLEM.values == {"a": 4, "b": 9, "c": 3, "d": 9, "e": 2, "u": 8}
    assert PROBLEM.needed == {"c", "d", "e"} and PROBLEM.answer == "2"
    assert PROBLEM.sensitivity == {"c": 2, "d": 1, "e": 1, "u": 0}  # c comes in twice, straight and through d


def test_truth_of_a_solution_with_a_detour_a_recheck_and_an_error():
    steps = [
        " c a4 + b9 = c3\n\n",
        " u d9 + b9 = u8\n\n",  # before d is known: a value from nowhere
        " d c3 - a4 = d8\n\n",  # 9 is right
        "Wait, d c3 - a4 = d8\n\n",
        " e c3 + d8 = e1\n\n",
        " e\n\n",
    ]
    assert read_truth(PROBLEM, steps) == [
        StepTruth("c", needed=True, right=True, matters=True, num_users=3, num_descendants=3),
        StepTruth("u"),
        StepTruth("d", needed=True, right=False, matters=True, num_users=1, num_descendants=1),
        StepTruth("d"),
        StepTruth("e", needed=True, right=True, matters=True),
        StepTruth(None),
    ]


def test_a_cancelled_step_is_needed_and_cannot_change_the_answer():
    # d = c + a, e = d - c: c comes in and goes out.
    problem = parse_problem(" a1; b2; c a + b; d c + a; e d - c; e?")
    truths = read_truth(problem, [" c a1 + b2 = c3", " d c3 + a1 = d4", " e d4 - c3 = e1"])
    assert [(t.needed, t.matters) for t in truths] == [(True, False), (True, True), (True, True)]


@pytest.mark.parametrize(
    "step",
    [
        " d c3 + a4 = d7",  # not its definition
        " d c2 - a4 = d8",  # a value that was not written
        " d c3 - a4 = d7",  # arithmetic
        " a c3 - c3 = a0",  # a constant
    ],
)
def test_kinds_of_wrong_steps(step):
    assert [t.right for t in read_truth(PROBLEM, [" c a4 + b9 = c3", step])] == [True, False]


@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(0, 4), st.integers(2, 4))
def test_teachers_that_never_err_write_what_the_truth_confirms(seed, needed, unneeded, constants):
    rng = random.Random(seed)
    problem = sample_dependencies(rng, ProblemSize(needed, unneeded, constants))
    assert len(problem.needed) == needed and len(problem.definitions) == needed + unneeded
    text = write_dependencies(problem, rng, Teacher(noise=0.0, detour=0.5, recheck=0.3))
    thinking, answer = text.split("</think>")
    truths = read_truth(problem, thinking.removesuffix("\n\n").split("\n\n"))
    assert all(truth.right for truth in truths) and answer.endswith(f"\\boxed{{{problem.answer}}}")
    assert {truth.name for truth in truths if truth.needed} == problem.needed
    assert sum(truth.needed for truth in truths) == needed  # re-checks are not needed
    assert [t.num_descendants > 0 for t in truths if t.needed] == [True] * (needed - 1) + [False]


def behind_operands(problem) -> bool:
    told = set()
    for line in problem.lines:
        if isinstance(line, Definition) and not {line.left, line.right} <= told:
            return False
        told.add(line.name if isinstance(line, Definition) else line[0])
    return True


def test_definitions_stand_behind_their_operands_unless_shuffled():
    problems = [sample_dependencies(random.Random(seed)) for seed in range(30)]
    assert all(map(behind_operands, problems))
    kinds = [[isinstance(line, Definition) for line in problem.lines] for problem in problems]
    assert any(of != sorted(of) for of in kinds)  # constants need not come first
    shuffled = [sample_dependencies(random.Random(seed), ProblemSize(shuffled=True)) for seed in range(30)]
    assert not any(map(behind_operands, shuffled))
    for one, other in zip(problems, shuffled, strict=True):  # the same problems, told in another order
        assert set(one.lines) == set(other.lines) and one.answer == other.answer


def test_the_teacher_goes_in_the_order_of_the_text():
    problem = sample_dependencies(random.Random(1))
    text = write_dependencies(problem, random.Random(0), Teacher(noise=0.0, detour=1.0, recheck=0.0))
    computed = [step.split()[0] for step in text.split("</think>")[0].strip("\n").split("\n\n")]
    assert computed == list(problem.definitions)[: len(computed)]


def test_a_size_without_names_for_it_is_refused():
    with pytest.raises(ValueError, match="names 27 variables; there are 26 names"):
        ProblemSize(20, 3, 4)


def test_solutions_have_at_least_fifteen_steps_and_150_tokens_and_survive_the_tokenizer():
    tokenizer, rng = build_dependency_tokenizer(), random.Random(0)
    for _ in range(20):
        problem = sample_dependencies(rng)
        solution = write_dependencies(problem, rng, Teacher())
        ids = tokenizer(problem.text + "<think>" + solution)["input_ids"]
        assert tokenizer.decode(ids) == problem.text + "<think>" + solution
        assert tokenizer.unk_token_id not in ids
        assert solution.count("\n\n") >= 15 and len(tokenizer(solution)["input_ids"]) >= 150
