r"""Plain answers read exactly, without an algebra system: numbers, their units, and what cannot be read at all.

All functions take text from `spelling.spelled`.
"""

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from .spelling import mixed_numbers_as_sums


_MAX_NUMBER_CHARS = 100

# Without meaning -------------------------------------------------------------------------------------

_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|rm|bf)\s*\{([^{}]*)\}"
)
_NO_MEANING = re.compile(r"\\[,;:! ]|\\\$|[$~*`]")
_SPACE_OUTSIDE_NUMBERS = re.compile(r"(?<![0-9]) | (?![0-9])")  # "1 2" is not "12"
_ALL_DASHES = str.maketrans("–—", "--")

# Units -----------------------------------------------------------------------------------------------

_MAX_UNIT_CHARS = 120
_CURRENCY = re.compile(r"^(-?)\s*(?:\\\$|[$€£¥₹])\s*(?=[0-9.])")
_DEGREES = re.compile(
    r"\s*(?:(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*(?:[CF]|\\text\{[CF]\}|\\mathrm\{[CF]\})?|"
    r"(?<=[0-9])\^\s*\{?\s*\\prime\s*(?:\\prime)?\s*\}?)$"
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|[0-9]))?"
_UNIT_COMMAND = re.compile(
    rf"(?:(?:\\[,;: ]|\\cdot|[ ~/])*\\(?:text|textrm|textnormal|mathrm|mbox|rm)\s*\{{([^{{}}0-9]*)\}}{_POWER})+$"
)
_SHORT_UNITS = (
    r"(?:[cmkdn]m|km|mm|in|ft|yd|mi|mg|kg|lbs?|oz|ml|mL|cc|hrs?|min|secs?|ms|mph|kmh|kph|Hz|kHz|MHz|GHz|eV|keV|MeV|"
    r"kJ|kW|kN|mol|Pa|kPa|rad|deg|AU|pc|dB|USD|EUR|cm|am|pm)"
)
_ONE_LETTER_UNITS = r"[msghLNJWVAKCFT]"
_WORD = r"[A-Za-z][A-Za-z'-]{2,}"
_UNIT_WORDS = re.compile(
    rf"(?<=[0-9A-Za-z)\]}}!])"
    rf"((?:(?:\\[,;: ]|[ ~])+(?:{_WORD}|{_SHORT_UNITS}|of|an?|if|or|is|to|by|sq|cu)(?:/{_WORD})?{_POWER}){{1,4}})\.?$"
)
_UNIT_SHORT = re.compile(rf"(?<=[0-9)}}])(?:\\[,;: ]|[ ~])*{_SHORT_UNITS}(?:/(?:{_SHORT_UNITS}|s|h))?{_POWER}\.?$")
_UNIT_LETTER = re.compile(rf"(?<=[0-9)}}])(?:\\[,;: ]|[ ~])+{_ONE_LETTER_UNITS}(?:/{_ONE_LETTER_UNITS})?{_POWER}$")
_UNIT_CJK = re.compile(r"(?<=[0-9)}])\s*[\u4e00-\u9fff\u3040-\u30ff\uac00-\ud7af]{1,6}$")
_CJK_NUMBERS = re.compile("[零一二两三四五六七八九十百千万萬亿億兆半分倍次方根折成负負余餘多几]")
# Words after a number that say another number, or that something else is said about it.
_NO_UNIT = re.compile(
    r"(?<![A-Za-z])(?:(?:hundred|thousand|million|billion|trillion|dozen|score|half|halve|halves|third|fourth|quarter|"
    r"fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|[a-z]+teenth|[a-z]+tieth|hundredth|thousandth|"
    r"millionth|billionth|per ?cent|percentage|pct|bp|plus|minus|time|fold|power)s?|over|and|or|not|if|when|where|"
    r"for|with|mod|modulo|base|squared?|cubed?|sqrt|roots?|factorial|choose|exponent|divided|multiplied|less|more|"
    r"fewer|greater|than|between|through|until|to|from|by|is|are|plus|double|triple|twice|once|thrice|but|except|"
    r"remainder|inverse|reciprocal|negative|positive|recurring|repeating|pi|zero|one|two|three|four|five|six|seven|"
    r"eight|nine|ten|eleven|twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|abc|xyz|alpha|beta|gamma|"
    r"[a-z]*illion(?:en|es)|milliarde?n?s?|millones|tausend|hundert|prozent|delta|theta|lambda|sigma|omega|sin|cos|tan|cot|sec|csc|log|exp|lcm|gcd|max)(?![A-Za-z])"
)
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\(?:text|mathrm|mbox)\{\s*\\?%\s*\}|"
    r"(?:\\text\{)?\s*(?:per ?cent|percentage|pct)(?: points?)?\s*\}?)$"
)

# Numbers ---------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.([0-9]*))?(?:[eE]([-+]?[0-9]{1,3}))?")
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\{([0-9]+)\}")
_SCIENTIFIC = re.compile(r"([-+]?)(?:([0-9.,]+)(?:\\times|\\cdot|x))?10\^(?:\{([-+]?[0-9]{1,3})\}|([0-9]))")
_FRACTION = re.compile(
    r"([-+]?)(?:([0-9]+) ?(?=\\frac))?(?:\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|([0-9]+)/([0-9]+))(?<!/)"
)


@dataclass(frozen=True)
class Plain:
    """A plain number: its value, whether it was written without rounding (no decimals), whether in per cent."""

    value: Fraction
    exact: bool
    percent: bool = False

    def values(self) -> tuple[Fraction, ...]:
        return (self.value, self.value / 100) if self.percent else (self.value,)


@functools.lru_cache(maxsize=1024)
def plain_text(answer: str) -> str:
    r"""The answer without what carries no meaning: spacing, `\text{}`, dollars, emphasis, the full stop."""
    answer = _TEXT_COMMAND.sub(r" \1 ", answer.replace("\\\\", "\\cr "))
    answer = _NO_MEANING.sub(" ", answer).replace("\\%", "%").translate(_ALL_DASHES)
    answer = _SPACE_OUTSIDE_NUMBERS.sub("", " ".join(answer.split())).removesuffix(".")
    if re.fullmatch(r"\([A-Za-z]\)", answer):  # a choice
        return answer[1]
    # A single letter is a variable, and x is not X.
    return answer.lower() if answer.isalpha() and len(answer) > 1 else answer


def without_unit(answer: str, letters: bool) -> str:
    r"""The answer without the unit at its end: "5 apples", `12\,\mathrm{cm}^2`, "$7", `45^\circ`.

    Args:
        answer: spelled text.
        letters: whether a single letter after a space ("5 m") may be a unit. In an accepted answer it is a variable.
    """
    answer = _DEGREES.sub("", _CURRENCY.sub(r"\1", answer.strip().removesuffix(".").strip("$ ")))
    for pattern in (_UNIT_COMMAND, _UNIT_WORDS, _UNIT_SHORT, *([_UNIT_LETTER] if letters else []), _UNIT_CJK):
        match = pattern.search(answer, max(0, len(answer) - _MAX_UNIT_CHARS))
        if not match or not answer[: match.start()].strip():
            continue
        words = _TEXT_COMMAND.sub(r" \1 ", match[0]).lower()
        if _NO_UNIT.search(_square_units_left_out(words)) or (pattern is _UNIT_CJK and _CJK_NUMBERS.search(words)):
            return answer
        return answer[: match.start()].rstrip("~ \\,;:") if pattern is not _UNIT_CJK else answer[: match.start()]
    return answer


def _square_units_left_out(words: str) -> str:
    """ "square meters" is a unit and "squared" alone is an operation."""
    return re.sub(r"(?:square|cubic)\s+(?=[a-z])|(?<=[a-z]{2})\s+(?:squared|cubed)", " ", words)


def plain_number(answer: str, letters: bool = True) -> Plain | None:
    """The value of a plain number (integer, decimal, fraction, mixed number, per cent), with a unit or none."""
    if len(answer) > _MAX_NUMBER_CHARS:
        return None
    answer = answer.strip("$ ")
    bare = _PERCENT.sub("", answer)
    if bare != answer:
        number = _read(plain_text(bare))
        return None if number is None else Plain(number.value, number.exact, percent=True)
    return _read(plain_text(without_unit(answer, letters)))


def _read(answer: str) -> Plain | None:
    if match := _SCIENTIFIC.fullmatch(answer):
        factor = _read(match[2] or "1")
        if factor is None:
            return None
        value = factor.value * Fraction(10) ** int(match[3] or match[4])
        return Plain(-value if match[1] == "-" else value, factor.exact)
    if match := _FRACTION.fullmatch(answer):
        sign, whole, *parts = match.groups()
        above, below = (int(part) for part in parts if part is not None)
        if below == 0 or (whole and not 0 < above < below):
            return None
        value = Fraction(above, below) + int(whole or 0)
        return Plain(-value if sign == "-" else value, exact=True)
    if match := _REPEATING.fullmatch(answer):
        sign, whole, decimals, period = match.groups()
        value = Fraction(f"{whole or 0}.{decimals or 0}")
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return Plain(-value if sign == "-" else value, exact=True)
    match = _DECIMAL.fullmatch(answer)
    if not match or not (match[2] or match[3]):
        return None
    sign, whole, decimals, exponent = match.groups(default="")
    value = Fraction(f"{sign}{whole.replace(',', '') or 0}.{decimals or 0}e{exponent or 0}")
    return Plain(value, exact=not decimals and not exponent)


# Readable --------------------------------------------------------------------------------------------

_UNREADABLE = re.compile(
    r"\\[lcd]?dots|\.\.\.|[0-9]\s*_|\)\s*_|"
    r"\\(?:to|rightarrow|Rightarrow|implies|mapsto|equiv|[pb]?mod|begin\{cases\})(?![A-Za-z])|"
    r"[0-9](?:\s|\\[,;:! ]|[~'\"])+[0-9]|\.[0-9]+\.|:[^:]*:"
)
_FUNCTION = re.compile(
    r"(?<![A-Za-z])(?:arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|lcm|gcd|max|min|det|and|or|infinity)"
    r"(?![A-Za-z])"
)
_COMMAND = re.compile(r"\\(?:begin|end|operatorname)\s*\{[A-Za-z*]+\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[a-z][A-Za-z]{3}|[A-Za-z]{3}[a-z]")
_TEXT_WITH_DIGITS = re.compile(r"\\text\s*\{([^{}0-9]*[0-9][^{}]*)\}")
_SUBSCRIPT = re.compile(r"_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\text\{[^{}]*\})")
_LOWER_CASE = re.compile(r"[a-z]{2}")
_LEFT_IN_WORDS = re.compile(r"^(?:\\text\{[^{}=]*\}|[A-Za-z ])+=(?=[^=]+$)")


def for_algebra(answer: str, letters: bool) -> str | None:
    """The answer as the LaTeX reader takes it; None where it would misread it.

    Words are products of letters to that reader, dots and subscripts of numbers nothing: text with any of them can
    be the same text as another, but not the same value.
    """
    answer = without_unit(answer, letters)
    answer = mixed_numbers_as_sums(answer)
    if answer is None:
        return None
    answer = answer.replace("\\$", "").replace("$", " ").strip().removesuffix(".")
    for delimiter in ("\\(", "\\)", "\\[", "\\]"):
        answer = answer.replace(delimiter, " ")
    left, is_equation, _ = answer.partition("=")
    if is_equation and ("\\text" in left or _PROSE.search(left)):
        answer = _LEFT_IN_WORDS.sub("", answer)
    if not answer.strip() or not answer.isascii() or _UNREADABLE.search(answer) or _has_prose(answer):
        return None
    return _TEXT_WITH_DIGITS.sub(r" \1 ", answer).strip()


def _has_prose(answer: str) -> bool:
    r"""Whether words stand in it: in `\text{}` any, elsewhere of four letters or more; names of functions are none."""
    answer = _SUBSCRIPT.sub("", answer)
    in_text = _FUNCTION.sub(" ", " ".join(_TEXT_COMMAND.findall(answer)))
    outside = _FUNCTION.sub(" ", _COMMAND.sub(" ", answer))
    return bool(_LOWER_CASE.search(in_text) or _PROSE.search(outside))
