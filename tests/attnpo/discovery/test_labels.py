"""Labels of steps and label files."""

import math

import pytest

from attn_trainers.attnpo.discovery.labels import (
    GIVEN,
    LabelledCompletion,
    LikelihoodThresholds,
    concludes_answer,
    first_derivation,
    label_after_answer,
    label_by_likelihood,
    read_labels,
    stands_in,
    write_labels,
)


E, R = "essential", "redundant"


@pytest.mark.parametrize(
    ("text", "answer", "concludes"),
    [
        ("So 6 * 7 = 42.", "42", True),
        ("so the total is $42$ apples", "42", True),
        ("\\boxed{ 42 }", "42", True),
        ("6 \\times 7 = 42 = x", "42", True),
        ("There were 42 apples at first.", "42", False),
        ("x = 42 + 3 = 45", "42", False),
        ("x = 42 \\times 3", "42", False),
        ("x = 42.5", "42", False),
        ("x = 421", "42", False),
        ("x = -42", "42", False),
        ("a total of $= 1,234,567$", "1234567", True),
        ("the sum is \\dfrac{1}{2}", "\\frac{1}{2}", True),
        ("**Final Answer**: (3, 4)", "(3, 4)", True),
        ("the point is \\left(3,\\,4\\right)", "(3,4)", True),
        ("f = \\leftarrow 4", "arrow 4", False),
        ("x = 3", "", False),
    ],
)
def test_concluding_the_answer(text, answer, concludes):
    assert concludes_answer(text, answer) is concludes


@pytest.mark.parametrize(
    ("answer", "problem", "stands"),
    [
        ("12", "There are 12 boxes.", True),
        ("12", "There are 120 boxes of 3.12 kg, x12 of them, at 12.5 each.", False),
        ("1200", "They paid $1,200.", True),
        ("3", "She eats Three for breakfast.", True),
        ("3", "She eats threefold.", False),
        ("3", "The numbers 1,3,5.", True),
        ("\\frac{1}{2}", "At least \\dfrac{1}{2} of them.", True),
        ("", "Nothing.", False),
    ],
)
def test_values_that_the_problem_gives(answer, problem, stands):
    assert stands_in(answer, problem) is stands


def test_restated_givens_derive_nothing():
    texts = ["The number of boxes is 12.", "So 3 times 4 is 12."]
    assert first_derivation(texts, "12", "Three rows of four boxes. How many?") == 0
    assert first_derivation(texts, "12", "There are 12 boxes. How many stay if none is taken?") is None
    assert first_derivation(texts, "13", "How many?") is None


def test_steps_after_the_answer_are_redundant():
    assert label_after_answer(["forward"] * 5, 2) == [None, None, E, R, R]
    assert label_after_answer(["forward", "turn", "final"], 0) == [E, R, None]
    assert label_after_answer(["turn", "final"], 1) == [None, None]
    assert label_after_answer(["forward"] * 2, None) == [None, None]


def test_labels_by_what_removal_does():
    drops = [5.0, 0.05, 3.0, 0.5, -2.0, 7.0, math.nan, 0.1]

    def label(share=0.25, drop=1.0, change=0.1):
        return label_by_likelihood(drops, LikelihoodThresholds(share, drop, change))

    assert label() == [E, R, None, None, R, E, None, R]
    assert label(share=1.0) == [E, R, E, None, R, E, None, R]
    assert label(drop=6.0) == [None, R, None, None, R, E, None, R]
    assert label(change=0.0) == [E, None, None, None, R, E, None, None]
    assert label_by_likelihood([]) == []
    assert label_by_likelihood([0.051, 0.009, 0.011, 0.02]) == [E, R, None, None]  # the defaults


def test_bad_thresholds_are_refused():
    with pytest.raises(ValueError, match="max_change=1.0"):
        LikelihoodThresholds(max_change=1.0)
    with pytest.raises(ValueError, match="essential_share=0"):
        LikelihoodThresholds(essential_share=0.0)


def example(**changes):
    fields = {
        "problem": "6 · 7?",
        "answer": "42",
        "completion": "six times seven 🙂</think>42",
        "completion_ids": [5, 6, 7, 8, 9],
        "step_ranges": [(0, 2), (2, 3)],
        "step_texts": ["six times ", "seven 🙂"],
        "labels": [E, None],
    }
    return LabelledCompletion(**{**fields, **changes})


def test_label_file_round_trip(tmp_path):
    path = tmp_path / "labels.jsonl"
    written = [example(), example(labels=[R, E], label_source="judge: J", derivation=1, drops=[0.5, -0.1])]
    write_labels(path, written)
    read = list(read_labels(path))
    assert read == written and (read[0].label_source, read[1].label_source) == (GIVEN, "judge: J")
    assert read[1].essential.tolist() == [False, True] and read[1].redundant.tolist() == [True, False]
    assert read[0].essential.tolist() == [True, False] and read[0].redundant.tolist() == [False, False]


def test_malformed_labels_are_refused(tmp_path):
    for changes, message in (
        ({"labels": [E]}, "1 labels"),
        ({"labels": [E, "useless"]}, "'useless'"),
        ({"step_ranges": [(0, 2), (1, 3)]}, "overlaps"),
        ({"step_ranges": [(0, 2), (2, 6)]}, "leaves the completion"),
    ):
        with pytest.raises(ValueError, match=message):
            example(**changes)
    path = tmp_path / "labels.jsonl"
    write_labels(path, [example()])
    path.write_text(path.read_text() + "\n{\n")
    with pytest.raises(ValueError, match="line 3"):
        list(read_labels(path))
