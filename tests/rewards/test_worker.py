"""What the grading process reads and what it finds equal, by itself: nothing is settled before it."""

import pytest

from attn_trainers.rewards.pool import RIGHT, WRONG, shared_pool


def grade(pairs: list[tuple[str, str]]) -> list[str]:
    return shared_pool().grade([{"pairs": [pair]} for pair in pairs], 20.0)


EQUAL = [
    (r"1-2^{-80}", r"\frac{2^{80}-1}{2^{80}}"),
    (r"(1-2^{-80},3)", r"(\frac{2^{80}-1}{2^{80}},3)"),
    (r"\sqrt{7+4\sqrt{3}}", r"2+\sqrt{3}"),
    (r"\sin\frac{\pi}{12}", r"\frac{\sqrt{6}-\sqrt{2}}{4}"),
    (r"\ln 32", r"5\ln 2"),
    (r"\pi", "3.14159265"),
    (r"\frac{5}{7}", "0.714286"),
    (r"\left[\frac{5}{7},1\right]", "[0.714286,1]"),
    (r"\begin{pmatrix} 5/2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2.5 \\ 1 \end{pmatrix}"),
    (r"\frac{1}{a-b}", r"-\frac{1}{b-a}"),
    (r"\cos 2t", r"1-2\sin^{2} t"),
    (r"n! \cdot (n+1)", "(n+1)!"),
    (r"2.5 \times 10^{-9}", "0.0000000025"),
    ("7", "k = 7"),
    ("k = 7", "7"),
    (r"\gcd(12,18)", "6"),
]

DIFFERENT = [
    (r"1-2^{-80}", r"1-2^{-81}"),
    (r"(1-2^{-80},3)", r"(1-2^{-81},3)"),
    (r"\{2^{-80},3\}", r"\{2^{-81},3\}"),
    (r"[0,10^{-50}]", r"[0,10^{-51}]"),
    (r"\begin{pmatrix} 2^{-80} \\ 1 \end{pmatrix}", r"\begin{pmatrix} 2^{-81} \\ 1 \end{pmatrix}"),
    (r"k = 2^{-80}", r"k = 2^{-81}"),
    (r"k < 2^{-80}", r"k < 2^{-81}"),
    (r"2^{-80}k", r"2^{-81}k"),
    ("k", r"k+2^{-80}"),
    (r"\frac{k}{700!}", r"\frac{k}{701!}"),
    (r"\sqrt{3}", r"\sqrt{3}+10^{-100}"),
    ("0", r"e^{-900}"),
    (r"e^{-900}", r"e^{-901}"),
    ("10^{15}", r"\sqrt{10^{30}+1}"),
    (r"\pi \cdot 10^{30}", r"\pi \cdot 10^{30}+1"),
    (r"2.5 \times 10^{-9}", r"2.5 \times 10^{-8}"),
    (r"\pi", "3.1416"),
    (r"\frac{k}{3}", "0.5k"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
    ("0", "2u - 5v + 1 = 0"),
    ("0", "u^2 + v^2 = 0"),
]

NOT_READ = [
    "3 \\to 2",
    "x² + 2",
    "\\begin{cases} 2 & n=1 \\\\ 3 & n>1 \\end{cases}",
    "2 \\oplus 3",
    "2\\%\\",
    "3 ⊕ 2",
    "\\frac{2",
]


@pytest.mark.parametrize(("pairs", "outcome"), [(EQUAL, RIGHT), (DIFFERENT, WRONG)])
def test_equal(pairs, outcome):
    assert [pair for pair, got in zip(pairs, grade(pairs), strict=True) if got != outcome] == []


def test_no_part_of_what_cannot_be_read_is_taken():
    pairs = [(number, text) for text in NOT_READ for number in ("2", "3")]
    assert grade(pairs + [(text, number) for number, text in pairs]) == [WRONG] * 2 * len(pairs)
    assert shared_pool().grade([{"golds": [text]} for text in NOT_READ], 20.0) == [WRONG] * len(NOT_READ)
    assert shared_pool().grade([{"golds": ["2+2", NOT_READ[0]]}], 20.0) == [RIGHT]
