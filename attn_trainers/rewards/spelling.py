r"""One spelling for what is written in many: Unicode mathematics, full-width forms, spaced thousands, mixed numbers.

`spelled(text)` gives plain LaTeX in ASCII as far as there is one. It changes how an answer is written, never what it
says; text it does not know is left as it is.
"""

import re
import unicodedata


_NO_SPACE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
# What compatibility normalisation does not know, or would change the meaning of.
_SYMBOLS = {
    "×": r"\times ",
    "⋅": r"\cdot ",
    "·": r"\cdot ",
    "•": r"\cdot ",
    "∙": r"\cdot ",
    "∗": "*",
    "÷": r"\div ",
    "∕": "/",
    "⁄": "/",
    "±": r"\pm ",
    "∓": r"\mp ",
    "−": "-",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≦": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∈": r"\in ",
    "∉": r"\notin ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∅": r"\emptyset ",
    "⌀": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "º": r"^\circ ",
    "°": r"^\circ ",
    "∘": r"\circ ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "∆": r"\Delta ",
    "→": r"\to ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "…": r"\ldots ",
    "⋯": r"\cdots ",
    "∣": "|",
    "‖": r"\|",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "、": ",",
    "。": ".",
    "｡": ".",
    "ℏ": r"\hbar ",
    "Ω": r"\Omega ",
    "µ": r"\mu ",
    "ϵ": r"\epsilon ",
    "ϕ": r"\phi ",
    "ϑ": r"\theta ",
}
_DASHES = "‐‑‒–—―﹣－"
_BETWEEN_DIGITS = re.compile(rf"(?<=[0-9])[{_DASHES}](?=[0-9])")  # "3–5" is a range, "–5" and "8 – 5" are minus signs
_DASH = re.compile(rf"[{_DASHES}](?!\ue000)")
_RANGE = "\ue000"  # holds the place of a range's dash
_GREEK = re.compile(r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)")

_SPACE = r"(?:\\[,;: ]|~|[ \t\n]|\\(?:thinspace|enspace|space)(?![A-Za-z]))"
_SEPARATOR = rf"(?:{_SPACE}+|{_SPACE}*\{{,\}}{_SPACE}*|,{_SPACE}*\\!{_SPACE}*|\\!{_SPACE}*|')"
_SPACED_THOUSANDS = re.compile(rf"(?<![0-9.,^_])[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}}(?![0-9]))+")
_INSIDE_THOUSANDS = re.compile(r"[^0-9]+")
_MIXED = re.compile(rf"(?<![0-9.,/^_}}])([0-9]{{1,12}}){_SPACE}+([0-9]{{1,12}})/([0-9]{{1,12}})(?![0-9/.,^!])")
_MIXED_FRAC = re.compile(
    rf"(?<![0-9.,/^_}}])([0-9]{{1,12}}){_SPACE}*\\frac\{{ *([0-9]{{1,12}}) *\}}\{{ *([0-9]{{1,12}}) *\}}(?![!^])"
)

_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_COMMAND_WITH_ARGUMENTS = re.compile(r"\\(frac|sqrt)(?![A-Za-z])(?:\s*\[[^\[\]{}]{0,20}\])?|\^(?=\s*\()")
_ONE_ARGUMENT = re.compile(r"\\[A-Za-z]+|[0-9A-Za-z]")
_ROOT_DIGITS = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SPACES_IN_A_ROW = re.compile(r"\s{2,}|[\t\n\r\f\v]")
_SPACES = re.compile(r"\s*")
_BRACKET = re.compile(r"\\.|[{}()]", re.DOTALL)
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt(?=\s*\()")
_PLAIN_NAME = re.compile(
    r"(?<![\\A-Za-z{])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![A-Za-z}])"
)
_SAME_MEANING = [
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|big|Big|bigg|Bigg)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:varnothing|O|empty)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\leqslant(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\geqslant(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\log\s*_\s*([0-9])\s*(?=[0-9A-Za-z\\(])"), r"\\log_{\1} "),
    (re.compile(r"(?<=[A-Za-z)\]}])'(?![A-Za-z'])"), r"^{\\prime}"),
    (re.compile(r"(?<=[A-Za-z)\]}])(?:''|\")(?![A-Za-z'])"), r"^{\\prime\\prime}"),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:q?quad|hspace\{[^{}]*\}|phantom\{[^{}]*\})(?![A-Za-z])"), " "),
]


def spelled(text: str) -> str:
    r"""The text in plain LaTeX: "２½" is `2\frac{1}{2}`, "√5" `\sqrt{5}`, "12 000" `12000`, "3 1/2" `3\frac{1}{2}`.

    Linear in the length of the text.
    """
    if not text.isascii():
        text = _from_unicode(text)
    text = _SPACES_IN_A_ROW.sub(" ", text)
    for pattern, meaning in _SAME_MEANING:
        text = pattern.sub(meaning, text)
    text = _SPACED_THOUSANDS.sub(lambda match: _INSIDE_THOUSANDS.sub("", match[0]), text)
    text = _PLAIN_NAME.sub(r"\\\1 ", _PLAIN_ROOT.sub(r"\\sqrt", text))
    text = _braced(text)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text)


def mixed_numbers_as_sums(text: str) -> str | None:
    r"""`3\frac{1}{2}` as `(3+\frac{1}{2})`. None where `3\frac{5}{2}` could be a sum or a product."""
    doubtful = False

    def as_sum(match: re.Match) -> str:
        nonlocal doubtful
        whole, above, below = match.groups()
        doubtful |= int(above) >= int(below)
        return f"({whole}+\\frac{{{above}}}{{{below}}})"

    text = _MIXED_FRAC.sub(as_sum, text)
    return None if doubtful else text


# Unicode ---------------------------------------------------------------------------------------------


def _from_unicode(text: str) -> str:
    text = _BETWEEN_DIGITS.sub(_RANGE, text.translate(_NO_SPACE))
    text = _DASH.sub("-", text)
    parts: list[str] = []
    raised = ""  # the command of the super- or subscript that is being read
    for char in text:
        kind, _, decomposed = unicodedata.decomposition(char).partition(" ") if char not in _SYMBOLS else ("", "", "")
        command = {"<super>": "^", "<sub>": "_"}.get(kind, "")
        if raised and command != raised:
            parts.append("}")
        if command and command != raised:
            parts.append(command + "{")
        raised = command
        parts.append(_in_ascii(char, kind, decomposed))
    text = "".join(parts) + "}" * bool(raised)
    return unicodedata.normalize("NFKC", text).replace(_RANGE, "–").replace("°", "^\\circ ")


def _in_ascii(char: str, kind: str, decomposed: str) -> str:
    if char.isascii():
        return char
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if kind == "<fraction>":
        above, _, below = "".join(chr(int(code, 16)) for code in decomposed.split()).partition("⁄")
        return f"\\frac{{{above}}}{{{below}}}" if below else char
    if kind == "<square>":  # units such as ㎡
        return " " + _from_unicode("".join(chr(int(code, 16)) for code in decomposed.split()))
    if unicodedata.category(char) == "Nd":
        return str(unicodedata.digit(char))
    plain = unicodedata.normalize("NFKC", char)
    if len(plain) == 1 and plain in _SYMBOLS:
        return _SYMBOLS[plain]
    if len(plain) == 1 and (greek := _GREEK.fullmatch(unicodedata.name(plain, ""))):
        name = greek[2].replace("LAMDA", "LAMBDA").lower()
        return f"\\{name.capitalize() if greek[1] == 'CAPITAL' else name} "
    return plain


# Arguments of fractions and roots --------------------------------------------------------------------


def _braced(text: str) -> str:
    r"""Every fraction and root with its arguments in braces: `\frac12`, `\sqrt 5`, `\sqrt(x+1)`; likewise `e^(2x)`."""
    if not ("frac" in text or "sqrt" in text or "^" in text):
        return text
    text = _FRACTION_COMMAND.sub(r"\\frac", text)
    closing = _closing_brackets(text)
    insertions: list[tuple[int, str]] = []
    for command in _COMMAND_WITH_ARGUMENTS.finditer(text):
        position = command.end()
        for _ in range(2 if command[1] == "frac" else 1):
            position = _brace_argument(text, position, closing, insertions, root=command[1] != "frac")
    parts, done = [], 0
    for position, brace in sorted(insertions, key=lambda insertion: insertion[0]):  # stable: "}" before a next "{"
        parts += [text[done:position], brace]
        done = position
    return "".join(parts) + text[done:]


def _brace_argument(text: str, position: int, closing: dict[int, int], insertions: list, root: bool) -> int:
    """Note the braces that the argument at `position` needs; the position after it."""
    position = _SPACES.match(text, position).end()
    bracket = text[position : position + 1]
    if bracket == "{" or (bracket == "(" and root):
        end = closing.get(position, len(text) - 1) + 1
        if bracket == "{":
            return end
    else:
        argument = (_ROOT_DIGITS if root else _ONE_ARGUMENT).match(text, position)
        argument = argument or _ONE_ARGUMENT.match(text, position)
        if not argument or argument[0] in ("\\frac", "\\sqrt"):
            return position
        end = argument.end()
    insertions += [(position, "{"), (end, "}")]
    return end


def _closing_brackets(text: str) -> dict[int, int]:
    """Where each brace and parenthesis that is opened is closed."""
    closing, opened = {}, []
    for match in _BRACKET.finditer(text):
        if match[0] in "{(":
            opened.append((match[0], match.start()))
        elif match[0] in "})" and opened and opened[-1][0] == {"}": "{", ")": "("}[match[0]]:
            closing[opened.pop()[1]] = match.start()
    return closing
