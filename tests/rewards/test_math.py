"""Math accuracy: agreement with recorded grades, equal and unequal answers, the documented table, hostile text."""

import json
import random
import re
import subprocess
import sys

import pytest

from attn_trainers.attnpo.rewards import get_length_penalised_accuracy_reward
from attn_trainers.rewards import worker as grading_worker
from attn_trainers.rewards.math import (
    boxed_format_reward,
    math_accuracy,
    math_accuracy_reward,
    unverifiable_answers,
)
from attn_trainers.rewards.spelling import spelled
from tests.helpers import ROOT


BENCHMARKS = ["aime24", "aime25", "amc23", "gsm8k", "math500", "minerva", "olympiad"]


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Against recorded data -------------------------------------------------------------------------------


def test_grades_real_completions_as_recorded(shared_dir):
    rollouts = read_lines(shared_dir / "data" / "graded_rollouts.jsonl")
    graded = math_accuracy_reward([r["completion"] for r in rollouts], [r["answer"] for r in rollouts])
    agreed = sum(bool(reward) == rollout["correct"] for reward, rollout in zip(graded, rollouts, strict=True))
    assert agreed / len(rollouts) >= 0.995


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_is_right(shared_dir, name):
    answers = [row["answer"] for row in read_lines(shared_dir / "data" / f"{name}.jsonl")]
    pairs = [(form, gold) for gold in answers for form in (gold if isinstance(gold, list) else [gold])]
    golds = [gold for _, gold in pairs]
    assert math_accuracy_reward([form for form, _ in pairs], golds) == [1.0] * len(pairs)
    assert math_accuracy_reward([boxed(form) for form, _ in pairs], golds) == [1.0] * len(pairs)
    assert math_accuracy_reward([f"<think>{form}</think> Done." for form, _ in pairs], golds) == [0.0] * len(pairs)


def test_what_can_be_read_is_equal_to_itself_when_spelled_otherwise(shared_dir):
    """So that golds are not right by their text alone: `\\dfrac`, `\\left(`, dollars and a lost space."""
    answers = [
        row["answer"] for name in ("math500", "olympiad") for row in read_lines(shared_dir / f"data/{name}.jsonl")
    ]
    unreadable = set(unverifiable_answers(answers))
    golds = [gold for index, gold in enumerate(answers) if index not in unreadable and "\\frac" in gold or "(" in gold]
    others = [gold.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)") for gold in golds]
    assert len(golds) > 150
    assert math_accuracy_reward([boxed(other) for other in others], golds) == [1.0] * len(golds)


def test_different_golds_are_different_answers(shared_dir):
    numbers = [row["answer"] for name in ("aime24", "amc23") for row in read_lines(shared_dir / f"data/{name}.jsonl")]
    pairs = [(a, b) for a in numbers for b in numbers]
    assert math_accuracy_reward([boxed(a) for a, _ in pairs], [b for _, b in pairs]) == [
        float(float(a) == float(b)) for a, b in pairs
    ]
    answers = [row["answer"] for row in read_lines(shared_dir / "data/math500.jsonl") if "\\" in row["answer"]]
    pairs = [tuple(random.Random(seed).sample(answers, 2)) for seed in range(300)]
    pairs = [(a, b) for a, b in pairs if spelled(a).replace(" ", "") != spelled(b).replace(" ", "")]
    assert math_accuracy_reward([boxed(a) for a, _ in pairs], [b for _, b in pairs]) == [0.0] * len(pairs)


# What equals what ------------------------------------------------------------------------------------

EQUAL = [
    ("1/2", boxed(r"\frac12")),
    ("1/2", boxed("0.5")),
    (r"\frac12", boxed("1/2")),
    ("1/3", boxed("0.333333")),
    (r"-\frac32", boxed("-1.5")),
    (r"1\frac12", boxed("1.5")),
    ("-1", boxed("−1")),
    (r"10\%", boxed("0.1")),
    ("10", boxed(r"10\%")),
    (r"\frac{3}{4}", boxed(r"75\%")),
    ("5", boxed("5 dollars")),
    ("5", boxed(r"5\text{ apples}")),
    ("12", boxed(r"12\,\mathrm{cm}^{2}")),
    ("5", boxed(r"\$5")),
    ("12500", boxed("12,500 dollars")),
    (r"10,\!080", boxed("10080")),
    ("1000", boxed("1{,}000")),
    (r"45^\circ", boxed("45")),
    ("45", boxed("45 degrees")),
    ("023", boxed("23")),
    ("4.4 \\times 10^7", boxed("4.4e7")),
    ("4.4 \\times 10^7", boxed("44000000")),
    ("C", boxed(r"\textbf{(C)}")),
    ("Evelyn", boxed(r"\text{Evelyn}")),
    (r"2\sqrt2", boxed(r"\sqrt{8}")),
    ("x^2+2x+1", boxed("(x+1)^2")),
    ("y=2x+3", boxed("y = 3+2x")),
    ("x=5", boxed("5")),
    (r"\{1,2\}", boxed(r"\{2,1\}")),
    ("(1,2)", boxed("(1, 2)")),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", boxed(r"\begin{bmatrix}1\\2\end{bmatrix}")),
    ("2,3", r"$\boxed{2}$ and $\boxed{3}$"),
    (["3", "4"], boxed("4")),
    (r"\boxed{7}", boxed("7")),
    ("3", r"<think>\boxed{4}</think> so \boxed{3}"),
    ("5", r"a </think> \boxed{4} b </think> \boxed{5}"),
    ("5", r"\boxed{5}, as asked within \boxed{}. So \boxed{5"),
    ("5", "The answer is $5$."),
    ("18", "#### 18"),
]


@pytest.mark.parametrize(("gold", "completion"), EQUAL)
def test_equivalent_answers_are_right(gold, completion):
    assert math_accuracy(completion, gold) == 1.0


UNEQUAL = [
    ("1/2", boxed("0.51")),
    ("1/3", boxed("0.33")),
    ("5", boxed("-5")),
    ("5", boxed("5x")),
    ("5", boxed("5 million")),
    ("5", boxed("not 5")),
    ("12", boxed("1 2")),
    ("31/2", boxed("3 1/2")),
    ("100", boxed("1,000")),
    ("(1,2)", boxed("[1,2]")),
    ("[1,2)", boxed("[1,2]")),
    ("(2,1)", boxed("(1,2)")),
    (r"(-\infty,2]", boxed(r"(-\infty,2)")),
    (r"x \le 2", boxed("x<2")),
    ("2,3", boxed("2")),
    ("2", boxed("2,3")),
    ("x+1", boxed("x-1")),
    ("3+4i", boxed("3-4i")),
    ("x", boxed("y")),
    ("A", boxed("B")),
    ("2^{100}", boxed("2^{100}+1")),
    ("2516_8", boxed("2516_9")),
    ("0.0000001", boxed("0")),
    ("6.6 \\times 10^{-34}", boxed("1.1 \\times 10^{-34}")),
    ("5.3 \\times 10^{-9}", boxed("5.3 \\times 10^{-8}")),
    ("5", r"<think>\boxed{5}</think> Done."),
    ("5", r"<think>The answer is 5.</think> \boxed{6}"),
    ("5", r"It is \boxed{5}. No, it is certainly \boxed{6}."),
    ("5", r"The final answer is 5. I hope it is correct. \boxed{6}"),
    ("3", r"\boxed{3} or \boxed{4}"),
    ("5", r"so \boxed{5"),
    ("5", ""),
    ("", boxed("")),
    ([], boxed("5")),
]


@pytest.mark.parametrize(("gold", "completion"), UNEQUAL)
def test_other_answers_are_wrong(gold, completion):
    assert math_accuracy(completion, gold) == 0.0


@pytest.mark.parametrize(("heading", "reward"), [("The same answer", 1.0), ("Not the same answer", 0.0)])
def test_the_documented_table(heading, reward):
    section = (ROOT / "docs" / "rewards.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| .+ \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| `") >= 40
    graded = math_accuracy_reward([rf"\boxed{{{answered}}}" for _, answered in rows], [gold for gold, _ in rows])
    assert [row for row, got in zip(rows, graded, strict=True) if got != reward] == []


# Reward functions ------------------------------------------------------------------------------------


def test_reward_of_strings_and_conversations_logs_the_same_metrics():
    logged = []
    texts = [boxed("3"), boxed("4")]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, conversations):
        reward = math_accuracy_reward(
            completions, answer=["3", "3"], prompts=["", ""], log_metric=lambda *metric: logged.append(metric)
        )
        assert reward == [1.0, 0.0]
    assert logged == [("grading/timeouts", 0.0), ("grading/kills", 0.0)] * 2


def test_length_penalised_accuracy_reward():
    reward = get_length_penalised_accuracy_reward(num_generations=4)
    completions = [r"\boxed{7}"] * 3 + [r"\boxed{8}"] * 5
    completion_ids = [[0] * n for n in (100, 200, 300, 50, 10, 20, 30, 40)]
    rewards = reward(completions=completions, answer=["7"] * 8, completion_ids=completion_ids)
    # Of the first group the right ones have mean length 200 and deviation 81.65; of the second none is right.
    assert rewards == pytest.approx([0.954579, 0.9, 0.845421, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="num_generations=4 does not divide the 3 completions"):
        reward(completions=completions[:3], answer=["7"] * 3, completion_ids=completion_ids[:3])


def test_boxed_format_reward():
    completions = [boxed("3"), "3", r"<think>\boxed{3}</think> 3", r"\boxed{3", [{"content": boxed("x")}]]
    assert boxed_format_reward(completions) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_unverifiable_answers():
    answers = ["12", r"\frac{1}{2}", "$t(0,4]$", "", None, ["$t(0,4]$", "4"], "x^2 + 1"]
    assert unverifiable_answers(answers) == [2, 3, 4]
    unread = [r"1, \ldots, 9", r"\begin{cases} 7 \\ 8 \end{cases}", r"\text{Ann has 7}", "7 tenths", r"3 \oplus 7"]
    read = ["Saturn", r"\text{(D)}", "D", "12_7", "7%", "7 plums", "3 1/2", "√7", r"(D) 7"]
    assert unverifiable_answers(unread + read) == list(range(len(unread)))


def test_import_loads_neither_torch_nor_trl_nor_vllm():
    code = "import sys, attn_trainers.rewards; print({'torch', 'trl', 'vllm', 'sympy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    from trl.rewards import think_format_reward

    import attn_trainers.rewards

    assert attn_trainers.rewards.think_format_reward is think_format_reward


# Hostile completions ---------------------------------------------------------------------------------

HOSTILE = {
    "megabyte of digits": boxed("9" * 1_000_000),
    "megabyte of digits, not boxed": "7" * 1_000_000,
    "power tower of Python": boxed("9**9**9**9"),
    "nested parentheses": boxed("(" * 3000 + "1" + ")" * 3000),
    "nested parentheses, not boxed": "answer: " + "(" * 3000 + "1" + ")" * 3000,
    "nested fractions": boxed("\\frac{1}{" * 600 + "2" + "}" * 600),
    "nested boxes": "\\boxed{" * 100_000 + "1" + "}" * 100_000,
    "boxes never closed": "\\boxed{" * 100_000,
    "empty boxes": "\\boxed{}" * 100_000,
    "lone surrogates": boxed("\ud800\udfff\ud800"),
    "lone surrogates, not boxed": "answer \ud800 " * 500,
    "NUL bytes": boxed("\x00 4 \x00"),
    "dollars": "$" * 100_000,
    "answer words": "final answer is " * 20_000,
    "backslashes": "\\" * 100_000,
    "spaces": boxed(" " * 1_000_000 + "x"),
    "huge number": boxed("1e999999999"),
    "huge matrix": boxed("\\operatorname{zeros}(100000,100000)"),
    "many thinks": "</think>" * 100_000,
    "unfinished commands": boxed("\\frac" * 1000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_leaves_the_pool_usable(name):
    assert math_accuracy(HOSTILE[name], "17") == 0.0
    assert math_accuracy(HOSTILE[name], "x^{17}", timeout=1.0) == 0.0
    assert math_accuracy(boxed("2\\sqrt{2}"), "\\sqrt{8}") == 1.0


@pytest.mark.parametrize(
    "call",
    ["__import__('os').mkdir('{}')", "f(__import__('os').mkdir('{}'))", "\\max(__import__('os').mkdir('{}'),1)"],
)
def test_text_is_not_run_as_code(tmp_path, call):
    trace = tmp_path / "ran"
    code = call.replace("{}", str(trace))
    assert math_accuracy(boxed(code), "17") == 0.0
    assert math_accuracy(f"The answer is {code}", "17") == 0.0
    assert not trace.exists()


def test_nothing_is_evaluated_as_python():
    """In a process of its own: SymPy's `eval` is made to fail, and answers are still compared."""
    code = """
import sys, runpy, sympy.parsing.sympy_parser as parser
grade = runpy.run_path(sys.argv[1])["load_grader"]()
def fail(*args): raise SystemExit("evaluated " + repr(args[0]))
parser.eval_expr = fail
for gold, text in [("6", "(1+2)*4/2"), ("1/2", "2^{-1}"), ("36", "\\\\operatorname{lcm}(12,18)"),
                   ("f(x+1,2)", "f(1+x, 2)"), ("10", "10\\\\%")]:
    assert grade({"pairs": [[gold, text]]}), text
print("compared")
"""
    done = subprocess.run([sys.executable, "-c", code, grading_worker.__file__], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("compared\n", "")
