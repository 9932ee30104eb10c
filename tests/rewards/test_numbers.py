r"""Plain numbers read exactly, units left out, and text that no reader may see."""

from fractions import Fraction

import pytest

from attn_trainers.rewards.numbers import Plain, for_algebra, plain_number, plain_text, without_unit


@pytest.mark.parametrize(
    ("text", "value", "exact"),
    [
        ("58", Fraction(58), True),
        ("-58", Fraction(-58), True),
        ("+58", Fraction(58), True),
        ("58.", Fraction(58), True),
        ("5,812", Fraction(5812), True),
        ("5.80", Fraction(29, 5), False),
        (".5", Fraction(1, 2), False),
        ("58e-3", Fraction(58, 1000), False),
        (r"5.8 \times 10^{4}", Fraction(58000), False),
        (r"10^{-4}", Fraction(1, 10_000), True),
        ("5/8", Fraction(5, 8), True),
        (r"-\frac{5}{8}", Fraction(-5, 8), True),
        (r"7\frac{5}{8}", Fraction(61, 8), True),
        (r"-7 \frac{5}{8}", Fraction(-61, 8), True),
        (r"0.\overline{45}", Fraction(5, 11), True),
        (r"0.5\overline{8}", Fraction(53, 90), True),
        (r"-0.5\overline{8}", Fraction(-53, 90), True),
        (r"58^\circ", Fraction(58), True),
        ("58 plums", Fraction(58), True),
        ("0" * 90 + "58", Fraction(58), True),
    ],
)
def test_plain_numbers(text, value, exact):
    assert plain_number(text) == Plain(value, exact)


@pytest.mark.parametrize("text", ["58%", r"58\%", "58 percent", r"58 \text{ percent}", "58 per cent"])
def test_per_cent(text):
    assert plain_number(text) == Plain(Fraction(58), exact=True, percent=True)
    assert plain_number(text).values() == (Fraction(58), Fraction(29, 50))


@pytest.mark.parametrize(
    "text",
    ["", ".", "x", "5 8", "5,81", "5.8.1", "5/0", r"\frac{5}{0}", r"7\frac{9}{8}", "5/8/2", "1e9999", "9" * 101],
)
def test_what_is_no_plain_number(text):
    assert plain_number(text) is None


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("58 plums", "58"),
        ("58 cubic feet", "58"),
        ("58 feet per second", "58"),
        ("58 metres squared", "58"),
        (r"58\text{ plums}", "58"),
        (r"58\,\mathrm{kg}\cdot\mathrm{m}^{2}", "58"),
        (r"\sqrt{58}\text{ cm}^3", r"\sqrt{58}"),
        (r"58\pi cubic inches", r"58\pi"),
        ("58 cm^2", "58"),
        ("58km", "58"),
        ("$58", "58"),
        ("€58", "58"),
        ("58厘米", "58"),
        ("58 s", "58"),
    ],
)
def test_units_are_left_out(text, bare):
    assert without_unit(text, letters=True) == bare


@pytest.mark.parametrize(
    "text",
    [
        "58 thousand",
        "58 eighths",
        "58 squared",
        "58 times",
        "58 or more",
        "58 minus two",
        "58 if even",
        "58 choose six",
    ]
    + ["58 base eight", "58n", "58 n", "58s", "58万", "58倍", r"58 \text{ or } n", r"\text{plums}", "plums"],
)
def test_what_is_no_unit(text):
    assert without_unit(text, letters=True) == text


def test_a_letter_is_a_unit_in_answers_only():
    assert plain_number("58 m") == Plain(Fraction(58), exact=True)
    assert plain_number("58 m", letters=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "5 8",
        r"5\,8",
        "5, 6, \\ldots, 8",
        "5 + \\cdots + 8",
        "5, ..., 8",
        "58_9",
        "5–8",
        r"5 \to 8",
        "5:8:9",
        "5.8.9",
        "",
    ]
    + [r"\text{Ann has 58}", "there are 58", r"58 \text{ if } n \text{ is even}", "58 plums and 9 pears", "3 5/4"],
)
def test_not_readable(text):
    assert for_algebra(text.replace("3 5/4", r"3\frac{5}{4}"), letters=True) is None


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"2\sqrt{58}", r"2\sqrt{58}"),
        (r"\text{Area} = 2\sqrt{58}", r"2\sqrt{58}"),
        ("Area of ABC = 58x", "58x"),
        (r"7\frac{5}{8}x", r"(7+\frac{5}{8})x"),
        (r"\sin x + \operatorname{lcm}(5,8)", r"\sin x + \operatorname{lcm}(5,8)"),
        (r"\begin{pmatrix} 5 \\ 8 \end{pmatrix}", r"\begin{pmatrix} 5 \\ 8 \end{pmatrix}"),
        (r"\(5x\).", "5x"),
        (r"\text{5 or 8}", "5 or 8"),
    ],
)
def test_readable(text, form):
    assert for_algebra(text, letters=True) == form


def test_plain_text():
    assert plain_text(r"\textbf{ Two  Plums }.") == "twoplums"
    assert plain_text(r"\text{(D)}") == "D"
    assert plain_text("X") == "X"
    assert plain_text("5 8") == "5 8"
    assert plain_text("(5, 8)") == plain_text(r"(\,5,\;8)") == "(5,8)"
