r"""What a completion answers: boxes, what is stated without one, labels and values of choices."""

import pytest

from attn_trainers.rewards.answers import answered, boxed_answers, choice, stated_answers
from attn_trainers.thinking import ThinkingTags


def test_answer_text():
    answer_text = ThinkingTags().answer_text
    assert answer_text("no thinking") == "no thinking"
    assert answer_text("<think>a</think> b </think> c") == " c"


def test_boxed_answers():
    assert boxed_answers("no box") is None
    assert boxed_answers(r"\boxed{} and \boxed{ }") == []
    assert boxed_answers(r"\boxed{1} so \boxed{\frac{2}{3}}") == [r"\frac{2}{3}"]
    assert boxed_answers(r"\boxed{1}, \boxed{2} and $\boxed{3}$") == ["1", "2", "3"]
    assert boxed_answers(r"\boxed{\{1, 2\}}") == [r"\{1, 2\}"]
    assert boxed_answers(r"\boxed 12.") == ["12"]


def test_answered():
    assert answered(r"\boxed{4}</think> \boxed{5}") == ["5"]
    assert answered(r"\boxed{5} and \boxed{6}") == ["6", "5, 6"]
    assert answered(r"\boxed{5") == []
    assert answered(rf"\boxed{{{'9' * 5000}}}") == []
    assert answered("The answer is 5.") == ["The answer is 5.", "5"]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("We add. The answer is 34 plums.", "34 plums"),
        ("The answer to this problem is: **34**", "34"),
        ("#### 34", "34"),
        ("Answer:\n\n$\\frac{3}{4}$", r"\frac{3}{4}"),
        ("First 3 and 4. So she pays $34 a day.", "$34 a day"),
        ("So $a = 3$ and finally $b = 34$.", "b = 34"),
        ("Hence\n\\[ b = 34 \\]", " b = 34 "),
        ("The answer is 3.4 kg. Great!", "3.4 kg"),
        ("So b is 10 - 2√5", "10 - 2√5"),
        ("The correct option is (C).", "(C)"),
        ("答案是 34。", "34"),
        ("The answer is 3. No: the answer is 34.", "34"),
    ],
)
def test_the_last_statement(text, last):
    assert stated_answers(text)[-1].strip() == last.strip()


@pytest.mark.parametrize(
    "text", ["The answer is not 34.", "It is between 3 and 34.", "It is at least 34", "Fewer than 34"]
)
def test_a_number_that_is_said_not_to_be_the_answer_is_not_taken(text):
    assert all(not stated.lstrip("$ ").startswith(("3", "34")) for stated in stated_answers(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(D)", ("D", None)),
        ("D", ("D", None)),
        (r"\textbf{(D)}", ("D", None)),
        (r"\textbf{(D)}\ 34", ("D", "34")),
        (r"\textbf{(D) } \frac{3}{4}", ("D", r"\frac{3}{4}")),
        (r"\text{(D) 34}", ("D", "34")),
        (r"\text{D. }34", ("D", "34")),
        (r"\mathrm{(D)}\quad -34", ("D", "-34")),
        ("(D) (3,4)", ("D", "(3,4)")),
        ("D) 34", ("D", "34")),
        ("(D) + 34", (None, "(D) + 34")),
        ("(D)^2", (None, "(D)^2")),
        ("(D)(E)", (None, "(D)(E)")),
        (r"(D) \cup (E)", (None, r"(D) \cup (E)")),
        ("D = 34", (None, "D = 34")),
        ("(x) 34", (None, "(x) 34")),
        ("34", (None, "34")),
    ],
)
def test_choice(text, expected):
    assert choice(text) == expected
