"""Labels for reasoning steps, essential or redundant, without an outside model.

AttnPO (arXiv 2602.09953) labels the steps of correct responses by the consensus of three judge models. Two rules that
need no judge are given here: what comes after the correct answer was first derived is redundant; and a step is
essential as far as the answer becomes less likely without it. Labels of any judge can be put in the same file.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor


ESSENTIAL, REDUNDANT = "essential", "redundant"

BY_LIKELIHOOD = "likelihood of the answer, no judge"
GIVEN = "given with the data"


@dataclass(frozen=True)
class LikelihoodThresholds:
    """From what change of the answer's likelihood on a step is essential or redundant.

    Attributes:
        essential_share: at most this share of a response's steps, rounded up, is essential.
        min_drop: least drop of an essential step, in nats per answer token.
        max_change: largest drop of a redundant step, in nats per answer token. A step whose removal raises the
            likelihood is redundant too.
    """

    essential_share: float = 0.25
    min_drop: float = 0.05
    max_change: float = 0.01

    def __post_init__(self):
        if not 0.0 < self.essential_share <= 1.0:
            raise ValueError(f"essential_share={self.essential_share} must lie in (0, 1].")
        if not 0.0 <= self.max_change < self.min_drop:
            raise ValueError(
                f"max_change={self.max_change} must be at least 0 and below min_drop={self.min_drop}; set it lower."
            )


@dataclass
class LabelledCompletion:
    """A correct response and the labels of its reasoning steps: one line of a label file.

    Attributes:
        problem: the problem.
        answer: its reference answer.
        completion: the response, for people and judges.
        completion_ids: its sampled token ids.
        step_ranges: half-open (start, end) token ranges of the steps, relative to the completion.
        step_texts: their texts.
        labels: "essential", "redundant" or None for each step.
        label_source: who labelled: `BY_LIKELIHOOD`, `GIVEN`, or what the data says, such as the name of a judge.
        derivation: index of the first step that derives the answer; None where none is known to.
        drops: what the answer loses without each step up to the derivation, in nats per answer token; empty where the
            labels do not come from it.
    """

    problem: str
    answer: str
    completion: str
    completion_ids: list[int]
    step_ranges: list[tuple[int, int]]
    step_texts: list[str]
    labels: list[str | None]
    label_source: str = GIVEN
    derivation: int | None = None
    drops: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.step_ranges = [(int(start), int(end)) for start, end in self.step_ranges]
        if not len(self.step_ranges) == len(self.step_texts) == len(self.labels):
            raise ValueError(
                f"{len(self.step_ranges)} step_ranges, {len(self.step_texts)} step_texts and {len(self.labels)} labels"
                ": give one of each per step"
            )
        for label in self.labels:
            if label not in (ESSENTIAL, REDUNDANT, None):
                raise ValueError(f"label {label!r} must be 'essential', 'redundant' or null")
        previous_end = 0
        for start, end in self.step_ranges:
            if not previous_end <= start < end <= len(self.completion_ids):
                raise ValueError(f"step range ({start}, {end}) is empty, overlaps or leaves the completion")
            previous_end = end

    @property
    def essential(self) -> Tensor:
        """(num_steps,) bool."""
        return torch.tensor([label == ESSENTIAL for label in self.labels], dtype=torch.bool)

    @property
    def redundant(self) -> Tensor:
        """(num_steps,) bool."""
        return torch.tensor([label == REDUNDANT for label in self.labels], dtype=torch.bool)


def write_labels(path: str | Path, completions: Iterable[LabelledCompletion]) -> None:
    """Write a label file, one JSON object a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        for completion in completions:
            file.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")


def read_labels(path: str | Path) -> Iterator[LabelledCompletion]:
    """Read a label file.

    Raises:
        ValueError: a line is malformed; the message names it.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield LabelledCompletion(**json.loads(line))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error


# What stands before a value that is being concluded, and what may stand between.
_CONCLUDES = r"(?:=|≈|:|\b(?:is|are|be|get|gets|gives|equals|yields)|\\boxed\s*\{)[\s$*({\[\\]*"
_NOT_AN_OPERAND = r"(?![\w^]|[.,]\d|\s*(?:[-+*/]|\\(?:times|cdot|div|pm)\b)\s*[\w\\(])"


def concludes_answer(step_text: str, answer: str) -> bool:
    """Whether a step concludes with the answer as a value: "= 42", "is 42", "\\boxed{42}", not a mere "42" in passing.

    White space, thousands separators and the size of fractions and brackets make no difference. Words are English.
    """
    value = _normalised(answer)
    if not value:
        return False
    pattern = _CONCLUDES + re.escape(value) + _NOT_AN_OPERAND
    return re.search(pattern, _normalised(step_text)) is not None


_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def stands_in(answer: str, problem: str) -> bool:
    """Whether a problem's text gives a value, in the spelling of `concludes_answer` or as a word up to "ten".

    A step that concludes with a value which the problem gives may restate what is given, so it derives nothing.
    """
    value, text = _normalised(answer), _normalised(problem)
    if not value:
        return False
    word = _NUMBER_WORDS[int(value)] if value.isdecimal() and int(value) < len(_NUMBER_WORDS) else None
    if word and re.search(rf"\b{word}\b", text, re.IGNORECASE):
        return True
    return re.search(rf"(?<![\w.]){re.escape(value)}(?![\w^]|\.\d)", text) is not None


def first_derivation(step_texts: Sequence[str], answer: str, problem: str) -> int | None:
    """Index of the first step that concludes with the answer; None where none does, or the problem gives the value."""
    if stands_in(answer, problem):
        return None
    return next((index for index, text in enumerate(step_texts) if concludes_answer(text, answer)), None)


def _normalised(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text).strip(" $")


def label_after_answer(kinds: Sequence[str], derivation: int | None) -> list[str | None]:
    """Label by position: redundant is what comes after the step that first derives the correct answer.

    That step is essential. Steps before it may be detours or not and stay unlabelled, as do those of kind "final",
    which restate the answer by design.

    Args:
        kinds: kind of each step.
        derivation: index of the step that first derives the answer, by `first_derivation`.

    Returns:
        A label or None per step; all None if no step derives the answer.
    """
    labels: list[str | None] = [None] * len(kinds)
    for index, kind in enumerate(kinds):
        if kind != "final" and derivation is not None and index >= derivation:
            labels[index] = ESSENTIAL if index == derivation else REDUNDANT
    return labels


def label_by_likelihood(drops: Sequence[float], thresholds: LikelihoodThresholds | None = None) -> list[str | None]:
    """Label by what removal does to the answer.

    Essential are the steps whose removal lowers the likelihood of the answer most, redundant those whose removal does
    not lower it. What lies between stays unlabelled.

    Args:
        drops: (num_steps,) log p(answer | all steps) - log p(answer | without this step), teacher-forced, in nats per
            answer token.
        thresholds: what is much and what is nothing.

    Returns:
        A label or None per step; None for a drop that is not finite.
    """
    thresholds = thresholds or LikelihoodThresholds()
    limit = math.ceil(thresholds.essential_share * len(drops))
    finite = [index for index, drop in enumerate(drops) if math.isfinite(drop)]
    most = sorted(finite, key=lambda index: drops[index], reverse=True)[:limit]
    labels: list[str | None] = [None] * len(drops)
    for index in finite:
        if drops[index] <= thresholds.max_change:
            labels[index] = REDUNDANT
        elif index in most and drops[index] >= thresholds.min_drop:
            labels[index] = ESSENTIAL
    return labels
