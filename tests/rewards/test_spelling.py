r"""One spelling: Unicode, full-width forms, spaced thousands, mixed numbers, the arguments of fractions and roots."""

import pytest

from attn_trainers.rewards.spelling import mixed_numbers_as_sums, spelled


SPELLED = [
    ("x + 1", "x + 1"),
    ("４８．５％", "48.5%"),
    ("（6，7］", "(6,7]"),
    ("٤٨", "48"),
    ("𝑎𝟐", "a2"),
    ("−4", "-4"),
    ("–4", "-4"),
    ("9 – 4", "9 - 4"),
    ("4–9", "4–9"),
    ("½", r"\frac{1}{2}"),
    ("6½", r"6\frac{1}{2}"),
    ("y⁴", "y^{4}"),
    ("10⁻¹²z", "10^{-12}z"),
    ("a₁₂", "a_{12}"),
    ("x²₁", "x^{2}_{1}"),
    ("√6", r"\sqrt {6}"),
    ("√60", r"\sqrt {60}"),
    ("∛6", r"\sqrt[3]{6}"),
    ("√(y+1)", r"\sqrt {(y+1)}"),
    ("2π", r"2\pi "),
    ("Ω", r"\Omega "),
    ("λ", r"\lambda "),
    ("30℃", r"30^\circ C"),
    ("3\u200b4", "34"),
    (r"\frac34", r"\frac{3}{4}"),
    (r"\dfrac{3}4", r"\frac{3}{4}"),
    (r"\frac\pi 4", r"\frac{\pi} {4}"),
    (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}"),
    (r"\sqrt15", r"\sqrt{15}"),
    (r"\sqrt{15}", r"\sqrt{15}"),
    ("sqrt(y)", r"\sqrt{(y)}"),
    ("e^(2y)", "e^{(2y)}"),
    ("y**3", "y^3"),
    ("f'(y)", r"f^{\prime}(y)"),
    (r"\left(1,2\right]", "(1,2]"),
    ("64 000", "64000"),
    ("64\u202f000 000", "64000000"),
    (r"64\,000", "64000"),
    (r"64{,}000", "64000"),
    (r"64,\!000", "64000"),
    ("64 00", "64 00"),
    ("64 0000", "64 0000"),
    ("0 640", "0 640"),
    ("1264 000", "1264 000"),
    ("2 3/4", r"2\frac{3}{4}"),
    (r"2\,3/4", r"2\frac{3}{4}"),
    (r"\frac", r"\frac"),
    (r"\sqrt", r"\sqrt"),
]


@pytest.mark.parametrize(("text", "expected"), SPELLED)
def test_spelled(text, expected):
    assert spelled(text) == expected
    assert spelled(expected) == expected


def test_mixed_numbers_as_sums():
    assert mixed_numbers_as_sums(r"2\frac{3}{4}") == r"(2+\frac{3}{4})"
    assert mixed_numbers_as_sums(r"-2 \frac{3}{4}x") == r"-(2+\frac{3}{4})x"
    assert mixed_numbers_as_sums(r"x^2\frac{3}{4}") == r"x^2\frac{3}{4}"
    assert mixed_numbers_as_sums(r"2\frac{\pi}{4}") == r"2\frac{\pi}{4}"
    assert mixed_numbers_as_sums(r"2\frac{7}{4}") is None
