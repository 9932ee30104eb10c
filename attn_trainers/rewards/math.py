r"""Rewards for mathematical reasoning: is the final answer right, is it boxed.

`math_accuracy` reads the answer from the text after the last `</think>` (the whole text where there is none): the
last `\boxed{}` if there is one, otherwise what the last sentence states. Equal texts and plain numbers are settled
here, all else by math-verify in worker processes with a time and a memory limit (`attn_trainers.rewards.pool`). Text
that cannot be read is right only where it is the accepted text.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from ..thinking import END_OF_THINKING, ThinkingTags
from .answers import answered, boxed_answers, choice
from .numbers import for_algebra, plain_number, plain_text
from .pool import KILLED, RIGHT, TIMEOUT, WRONG, shared_pool
from .spelling import spelled


TIMEOUT_SECONDS = 5.0

_MAX_GOLD_CHARS = 8_000  # over all accepted answers of one problem
_WITH_BASE = re.compile(r"\(?([0-9A-F]+)\)?_\{?([0-9]+)\}?")
_NAME = re.compile(r"[A-Z]{3,}")
_SET = re.compile(r"\\\{[^()\[\]]*\\\}")
_TUPLE = re.compile(r"\([^()]*,[^()]*\)")
_BRACKET = re.compile(r"[()\[\]{}]")
# Rounded numbers (decimals) that differ by more are different; math-verify looks at the rest.
_SURELY_DIFFERENT = Fraction(1, 100_000)


# What equals what ------------------------------------------------------------------------------------


def _settle(answer: str, gold: str) -> bool | list[str]:
    """Whether an answer is right where texts or plain numbers decide it, otherwise the [gold, answer] to compare."""
    label, value = choice(answer)
    gold_label, gold_value = choice(gold)
    if plain_text(answer) == plain_text(gold):
        return True
    if label and gold_label and not (value is None or gold_value is None):
        return label == gold_label and _settle_value(value, gold_value)
    if label and gold_label:
        return label == gold_label
    return _settle_value(value or answer, gold_value or gold)


def _settle_value(answer: str, gold: str) -> bool | list[str]:
    answer_form, gold_form = plain_text(answer), plain_text(gold)
    if answer_form == gold_form:
        return True
    with_base, gold_with_base = _WITH_BASE.fullmatch(answer_form), _WITH_BASE.fullmatch(gold_form)
    if with_base and gold_with_base:  # math-verify does not see the base
        return with_base.groups() == gold_with_base.groups()
    if _differs_in_form(answer, gold):
        return False
    number, gold_number = plain_number(answer), plain_number(gold, letters=False)
    if number and gold_number:
        if number.percent == gold_number.percent:
            pairs = [(number.value, gold_number.value)]
        else:  # "28" and "0.28" both say 28 %
            pairs = [(a, b) for a in number.values() for b in gold_number.values()]
        if any(a == b for a, b in pairs):
            return True
        if (number.exact and gold_number.exact) or all(abs(a - b) > _SURELY_DIFFERENT for a, b in pairs):
            return False
    readable, gold_readable = for_algebra(answer, letters=True), for_algebra(gold, letters=False)
    return False if readable is None or gold_readable is None else [gold_readable, readable]


def _differs_in_form(answer: str, gold: str) -> bool:
    """What an algebra system does not see: a letter's case, the order of capitals, set or tuple, repeated items."""
    forms = plain_text(answer), plain_text(gold)
    if all(form.isalpha() for form in forms):
        letters, names = all(len(form) == 1 for form in forms), all(map(_NAME.fullmatch, (answer, gold)))
        if letters or names:
            return True
    is_set, is_tuple = [bool(_SET.fullmatch(form)) for form in forms], [bool(_TUPLE.fullmatch(form)) for form in forms]
    return (is_set[0] and is_tuple[1]) or (is_tuple[0] and is_set[1]) or _repeats(forms[0]) != _repeats(forms[1])


def _repeats(form: str) -> int:
    """How many items of a bare list stand in it already: `1,1,2` is not `1,2`."""
    items = form.split(",")
    return 0 if _BRACKET.search(form) else len(items) - len(set(items))


def _accepted(answer) -> list[str]:
    r"""Accepted answers as spelled strings, those in `\boxed{}` taken out of it."""
    answers = answer if isinstance(answer, list | tuple) else [answer]
    texts = [str(text).strip() for text in answers if text is not None]
    texts = [(boxed_answers(text) or [text])[-1].strip("$ \n") for text in texts if text]
    return [spelled(text) for text in texts if text]


def _prepare(completion: str, answer, end_of_thinking: str) -> bool | dict:
    """Right or wrong where that is plain to see, otherwise the request for a grading worker."""
    golds = _accepted(answer)
    answers = [spelled(text) for text in dict.fromkeys(answered(completion, end_of_thinking))]
    if sum(map(len, golds)) > _MAX_GOLD_CHARS:
        golds = []
    settled = [_settle(text, gold) for text in answers if text for gold in golds]
    if True in settled:
        return True
    pairs = [pair for pair in settled if pair]
    return {"pairs": pairs} if pairs else False


def _grade(
    completions: Sequence[str], answers: Sequence, ends: Sequence[str], timeout: float, within: float | None = None
) -> list[str]:
    """RIGHT, WRONG, TIMEOUT or KILLED per completion. Equal requests are graded once."""
    prepared = [_prepare(*one) for one in zip(completions, answers, ends, strict=True)]
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


def ends_of_thinking(given: str | Sequence[str] | None, count: int) -> list[str]:
    """What ends the thinking of each of `count` completions, from what a reward function was given: a text for all,
    one for each (as the trainers here pass their setting), or nothing for the default."""
    if given is None or isinstance(given, str):
        return [given or END_OF_THINKING] * count
    return list(given)


def math_accuracy(
    completion: str,
    answer: str | list[str],
    *,
    timeout: float = TIMEOUT_SECONDS,
    end_of_thinking: str = END_OF_THINKING,
) -> float:
    r"""1.0 if the final answer of a completion equals an accepted answer, else 0.0 (AttnRL's accuracy reward, 0/1).

    Only the text after the last end of thinking counts, and in it only the last `\boxed{}` if there is one. Sets,
    tuples, intervals, units and percentages compare as in math-verify.

    Args:
        completion: what the model wrote; any text, however long, deep or malformed.
        answer: the accepted answer or several of them, of which any is right.
        timeout: seconds of work after which the answer counts as wrong. The call is over within a second more, the
            start of a worker (one to two seconds where none runs yet) included.
        end_of_thinking: text that ends the thinking.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    return float(_grade([completion], [answer], [end_of_thinking], timeout, within=timeout + 0.4)[0] == RIGHT)


def math_accuracy_reward(completions, answer, log_metric=None, end_of_thinking=None, **kwargs) -> list[float]:
    """TRL reward function: `math_accuracy` of a batch, graded in parallel.

    Args:
        completions: strings, or lists of messages of which the last counts.
        answer: the dataset's column, one accepted answer or list of accepted answers per completion.
        log_metric: TRL's; receives `grading/timeouts` and `grading/kills`, the number of completions of this call that
            lost their answer to the time limit or with their worker. Both are logged on every call of every rank.
        end_of_thinking: text that ends the thinking, for all or for each; the trainers here pass their setting.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    texts, ends = [_final_message(one) for one in completions], ends_of_thinking(end_of_thinking, len(completions))
    outcomes = _grade(texts, answer, ends, TIMEOUT_SECONDS)
    if log_metric is not None:
        log_metric("grading/timeouts", float(outcomes.count(TIMEOUT)))
        log_metric("grading/kills", float(outcomes.count(KILLED)))
    return [float(outcome == RIGHT) for outcome in outcomes]


def boxed_format_reward(completions, end_of_thinking=None, **kwargs) -> list[float]:
    r"""TRL reward function: 1.0 where the text after the thinking holds a closed, non-empty `\boxed{}`."""
    ends = ends_of_thinking(end_of_thinking, len(completions))
    answers = [ThinkingTags(end).answer_text(_final_message(one)) for one, end in zip(completions, ends, strict=True)]
    return [float(bool(boxed_answers(answer))) for answer in answers]


def unverifiable_answers(answers: Sequence[str | list[str]]) -> list[int]:
    """Indices of the answers of which no accepted form can be read: only an identical text would be right.

    A word or a choice's label counts as read: the same word is what is asked for.

    Raises:
        RuntimeError: grading workers cannot be started.
    """
    accepted = [_accepted(answer) for answer in answers]
    open_items = [index for index, golds in enumerate(accepted) if not any(map(_reads_by_itself, golds))]
    readable = {index: [form for gold in accepted[index] if (form := _for_reading(gold))] for index in open_items}
    parsable = [index for index, forms in readable.items() if forms and sum(map(len, forms)) <= _MAX_GOLD_CHARS]
    outcomes = shared_pool().grade([{"golds": readable[index]} for index in parsable], TIMEOUT_SECONDS)
    verified = {index for index, outcome in zip(parsable, outcomes, strict=True) if outcome == RIGHT}
    return [index for index in open_items if index not in verified]


def _reads_by_itself(gold: str) -> bool:
    form = plain_text(gold)
    is_word = form.isalpha() or bool(_WITH_BASE.fullmatch(form))
    return is_word or choice(gold)[0] is not None or plain_number(gold, letters=False) is not None


def _for_reading(gold: str) -> str | None:
    return for_algebra(gold, letters=False)
