r"""Rewards for mathematical reasoning: is the final answer right, is it boxed.

`math_accuracy` reads the answer from the text after the last `</think>` (the whole text where there is none): the
last `\boxed{}` if there is one, otherwise what math-verify finds. Equal strings and plain numbers are settled here,
all else by math-verify in worker processes with a time and a memory limit (`attn_trainers.rewards.pool`).
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from .pool import KILLED, RIGHT, TIMEOUT, WRONG, shared_pool


TIMEOUT_SECONDS = 5.0

_MAX_BOXED_CHARS = 4_000  # a longer answer is no answer
_TAIL_CHARS = 6_000  # of an answer that is not boxed, this much is searched
_MAX_NUMBER_CHARS = 100
_MAX_GOLD_CHARS = 8_000  # over all accepted answers of one problem
_BOX_OR_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*)(?:\{|(?P<number>-?[0-9](?:[0-9.,/]*[0-9])?))|\\.|[{}]", re.DOTALL
)
_BETWEEN_BOXES = re.compile(r"[\s$,;.()\[\]\\]*(?:\\text\{\s*)?(?:and|or)?(?:\s*\})?[\s$,;.()\[\]\\]*")
_FILLED = re.compile(r"\S")
_MAX_BETWEEN_BOXES = 40
_MAX_BOXES = 16

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NO_MEANING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|\\\$|[$~]")
_SPACE_OUTSIDE_NUMBERS = re.compile(r"(?<![0-9]) | (?![0-9])")  # "3 1/2" is not "31/2"
_DECIMAL = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.([0-9]*))?(?:[eE]([-+]?[0-9]{1,3}))?")
_SCIENTIFIC = re.compile(r"([-+]?[0-9.]+)(?:\\times|\\cdot|×)10\^(?:\{([-+]?[0-9]{1,3})\}|([0-9]))")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|\\frac([0-9])([0-9])|([0-9]+)/([0-9]+))")
_WITH_BASE = re.compile(r"([0-9A-F]+)_\{?([0-9]+)\}?")
_DEGREES = re.compile(r"(?:\^\{?\\circ\}?|\\degree|°)$")
_WITH_UNIT = re.compile(r"([-+]?[0-9][0-9.,/]*)((?: [A-Za-z]{3,}){1,3})")
_NUMBER_WORDS = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|halves|third|quarter|percent|percentage|pct|plus|minus|"
    r"times|over|and)s?\b"
)
# Math-verify rounds to six decimals: numbers further apart than this it never calls equal.
_SURELY_DIFFERENT = Fraction(1, 100_000)


# What was answered -----------------------------------------------------------------------------------


def answer_text(completion: str) -> str:
    """The part of a completion that counts: after the last `</think>`, or all of it."""
    return completion.rpartition("</think>")[2]


def boxed_answers(text: str) -> list[str] | None:
    r"""Contents of the last closed `\boxed{}` and of those right before it ("`\boxed{2}` and `\boxed{3}`"), in order.

    Passed over: empty boxes, as in a repeated instruction, and one that the length limit cut off. None: there is no
    box. []: none is closed and filled. Linear in the length of the text.
    """
    spans = _closed_boxes(text)
    if not spans:
        return None if spans is None else []
    boxes: list[str] = []
    following = len(text)  # where the box after this one starts
    for start, content_start, end in reversed(spans):
        between = text[end:following].removeprefix("}")
        if boxes and (end >= following or len(between) > _MAX_BETWEEN_BOXES or not _BETWEEN_BOXES.fullmatch(between)):
            break
        boxes.insert(0, text[content_start:end].strip())
        following = start
        if len(boxes) == _MAX_BOXES:
            break
    return boxes


def _closed_boxes(text: str) -> list[tuple[int, int, int]] | None:
    """(start of the command, start and end of the content) of every closed, filled box by its start; None: no box."""
    spans, open_braces, seen = [], [], False
    for match in _BOX_OR_BRACE.finditer(text):
        is_box, number = match["box"], match["number"]
        seen |= bool(is_box)
        if number:
            spans.append((match.start(), match.start("number"), match.end()))
        elif match[0].endswith("{") and (is_box or match[0] == "{"):
            open_braces.append((match.start(), match.end()) if is_box else None)
        elif match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened and _FILLED.search(text, opened[1], match.start()):
                spans.append((*opened, match.start()))
    return sorted(spans) if seen else None


# Equal without an algebra system ---------------------------------------------------------------------


def _normal_form(answer: str) -> str:
    r"""The answer without what carries no meaning: spacing, `\left`, `\text{}`, dollars, the full stop."""
    answer = _TEXT_COMMAND.sub(r" \1 ", answer.replace("−", "-").replace("\\\\", "\\cr "))
    answer = _NO_MEANING.sub(" ", answer.replace("\\!", "").replace("{,}", ",").replace("\\%", "%"))
    answer = re.sub(r"\\[dtc]frac", r"\\frac", answer)
    answer = _SPACE_OUTSIDE_NUMBERS.sub("", " ".join(answer.split())).removesuffix(".")
    if re.fullmatch(r"\([A-Za-z]\)", answer):  # a choice
        return answer[1]
    # A single letter is a variable, and x is not X.
    return answer.lower() if answer.isalpha() and len(answer) > 1 else answer


def _number(answer: str) -> Fraction | None:
    """The value of a plain number, decimal or fraction, with thousands separators, degrees or a unit in words."""
    if len(answer) > _MAX_NUMBER_CHARS:
        return None
    with_unit = _WITH_UNIT.fullmatch(" ".join(_TEXT_COMMAND.sub(r" \1 ", answer).split()))
    if with_unit and not _NUMBER_WORDS.search(with_unit[2].lower()):
        answer = with_unit[1]
    answer = _DEGREES.sub("", _normal_form(answer))
    if match := _SCIENTIFIC.fullmatch(answer):
        factor = _number(match[1])
        return None if factor is None else factor * Fraction(10) ** int(match[2] or match[3])
    if match := _FRACTION.fullmatch(answer):
        sign, *parts = match.groups()
        above, below = (int(part) for part in parts if part is not None)
        return None if below == 0 else Fraction(above, below) * (-1 if sign == "-" else 1)
    match = _DECIMAL.fullmatch(answer)
    if not match or not (match[2] or match[3]):
        return None
    sign, whole, decimals, exponent = match.groups(default="")
    return Fraction(f"{sign}{whole.replace(',', '') or 0}.{decimals or 0}e{exponent or 0}")


def _settle(answer: str, gold: str) -> bool | None:
    """Whether an answer is right, where strings or plain numbers decide it; None where they do not."""
    answer_form, gold_form = _normal_form(answer), _normal_form(gold)
    if answer_form == gold_form:
        return True
    with_base, gold_with_base = _WITH_BASE.fullmatch(answer_form), _WITH_BASE.fullmatch(gold_form)
    if with_base and gold_with_base:  # math-verify does not see the base
        return with_base.groups() == gold_with_base.groups()
    a, b = _number(answer), _number(gold)
    if a is None or b is None:
        return None
    if a == b:
        return True
    return False if abs(a - b) > _SURELY_DIFFERENT else None


def _accepted(answer) -> list[str]:
    r"""Accepted answers as strings, those in `\boxed{}` taken out of it."""
    answers = answer if isinstance(answer, list | tuple) else [answer]
    texts = [str(text).strip() for text in answers if text is not None]
    return [(boxed_answers(text) or [text])[-1].strip("$ \n") for text in texts if text]


def _prepare(completion: str, answer) -> bool | dict:
    """Right or wrong where that is plain to see, otherwise the request for a grading worker."""
    golds = _accepted(answer)
    text = answer_text(completion)
    boxes = boxed_answers(text)
    final = text.strip() if boxes is None else (boxes or [""])[-1]
    if not golds or not final:
        return False
    if len(final) <= _MAX_BOXED_CHARS:
        settled = [_settle(final, gold) for gold in golds]
        if True in settled:
            return True
        if settled.count(False) == len(settled) and (boxes is None or len(boxes) == 1):
            return False
    elif boxes is not None:
        return False
    if sum(map(len, golds)) > _MAX_GOLD_CHARS:
        return False
    if boxes is None:
        return {"golds": golds, "texts": [final[-_TAIL_CHARS:]]}
    texts = [final] if len(boxes) == 1 else [final, ", ".join(boxes)[:_MAX_BOXED_CHARS]]
    return {"golds": golds, "texts": ["\\boxed{" + text + "}" for text in texts]}


def _grade(completions: Sequence[str], answers: Sequence, timeout: float, within: float | None = None) -> list[str]:
    """RIGHT, WRONG, TIMEOUT or KILLED per completion. Equal requests are graded once."""
    prepared = [_prepare(completion, answer) for completion, answer in zip(completions, answers, strict=True)]
    open_requests = {repr(request): request for request in prepared if isinstance(request, dict)}
    graded = shared_pool().grade(list(open_requests.values()), timeout, within) if open_requests else []
    outcome_of = dict(zip(open_requests, graded, strict=True))
    return [
        outcome_of[repr(request)] if isinstance(request, dict) else RIGHT if request else WRONG for request in prepared
    ]


# Rewards ---------------------------------------------------------------------------------------------


def _final_message(completion: str | list[dict]) -> str:
    """The text of a completion, which TRL passes as a string or as a list of messages."""
    content = completion if isinstance(completion, str) else completion[-1]["content"] if completion else ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def math_accuracy(completion: str, answer: str | list[str], *, timeout: float = TIMEOUT_SECONDS) -> float:
    r"""1.0 if the final answer of a completion equals an accepted answer, else 0.0 (AttnRL's accuracy reward, 0/1).

    Only the text after the last `</think>` counts, and in it only the last `\boxed{}` if there is one. Sets, tuples,
    intervals, units and percentages compare as in math-verify.

    Args:
        completion: what the model wrote; any text, however long, deep or malformed.
        answer: the accepted answer or several of them, of which any is right.
        timeout: seconds of work after which the answer counts as wrong. The call is over within a second more, the
            start of a worker (one to two seconds where none runs yet) included.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    return float(_grade([completion], [answer], timeout, within=timeout + 0.4)[0] == RIGHT)


def math_accuracy_reward(completions, answer, log_metric=None, **kwargs) -> list[float]:
    """TRL reward function: `math_accuracy` of a batch, graded in parallel.

    Args:
        completions: strings, or lists of messages of which the last counts.
        answer: the dataset's column, one accepted answer or list of accepted answers per completion.
        log_metric: TRL's; receives `grading/timeouts` and `grading/kills`, the number of completions of this call that
            lost their answer to the time limit or with their worker. Both are logged on every call of every rank.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    outcomes = _grade([_final_message(completion) for completion in completions], answer, TIMEOUT_SECONDS)
    if log_metric is not None:
        log_metric("grading/timeouts", float(outcomes.count(TIMEOUT)))
        log_metric("grading/kills", float(outcomes.count(KILLED)))
    return [float(outcome == RIGHT) for outcome in outcomes]


def boxed_format_reward(completions, **kwargs) -> list[float]:
    r"""TRL reward function: 1.0 where the text after the last `</think>` holds a closed, non-empty `\boxed{}`."""
    return [float(bool(boxed_answers(answer_text(_final_message(completion))))) for completion in completions]


def unverifiable_answers(answers: Sequence[str | list[str]]) -> list[int]:
    """Indices of the answers in whose accepted forms nothing can be parsed: only an identical string would be right.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    accepted = [_accepted(answer) for answer in answers]
    open_items = [index for index, golds in enumerate(accepted) if all(_number(gold) is None for gold in golds)]
    parsable = [index for index in open_items if accepted[index] and sum(map(len, accepted[index])) <= _MAX_GOLD_CHARS]
    outcomes = shared_pool().grade([{"golds": accepted[index]} for index in parsable], TIMEOUT_SECONDS)
    verified = {index for index, outcome in zip(parsable, outcomes, strict=True) if outcome == RIGHT}
    return [index for index in open_items if index not in verified]
