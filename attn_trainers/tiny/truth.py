"""What is known of every step of a solution to a dependency problem, read from its text, a sampled one too."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .dependencies import MODULUS, RECHECK, Definition, DependencyProblem


_STEP = re.compile(rf"\s*({RECHECK})? ([a-z]) ([a-z])(\d) ([-+]) ([a-z])(\d) = ([a-z])(\d)\s*")


@dataclass(frozen=True)
class StepTruth:
    """The truth of one step.

    Attributes:
        name: the variable it computes; None for a step that is none, of which all else is False or 0.
        needed: it is the first to compute a variable that the question depends on.
        right: definition, operand values (those written before) and result are as they should be.
        matters: it is needed, and some error in its result changes the answer.
        num_users: later steps that use its value.
        num_descendants: later steps that depend on its value, at any remove.
    """

    name: str | None
    needed: bool = False
    right: bool = False
    matters: bool = False
    num_users: int = 0
    num_descendants: int = 0


@dataclass(frozen=True)
class _Written:
    name: str
    operands: tuple[tuple[str, int], tuple[str, int]]
    sign: int
    result: int


def _read(text: str) -> _Written | None:
    match = _STEP.fullmatch(text)
    if match is None or match[2] != match[8]:
        return None
    operands = ((match[3], int(match[4])), (match[6], int(match[7])))
    return _Written(match[2], operands, 1 if match[5] == "+" else -1, int(match[9]))


def read_truth(problem: DependencyProblem, steps: Sequence[str]) -> list[StepTruth]:
    """The truth of each step.

    A value that a step uses comes from the first earlier step that wrote the same value for that variable or, where
    none did (a slip in copying), from the last that wrote one. So a re-check that confirms a step has no users.

    Args:
        problem: what is solved.
        steps: the texts of the steps before `</think>`, one paragraph each.
    """
    written = [_read(text) for text in steps]
    values = dict(problem.constants)
    sources: list[set[int]] = []  # of each step, the earlier steps whose values it uses
    right, first = [], []
    for index, step in enumerate(written):
        sources.append(set())
        if step is None:
            right.append(False)
            first.append(False)
            continue
        for name, value in step.operands:
            origin = _origin(written[:index], name, value)
            if origin is not None:
                sources[index].add(origin)
        right.append(_is_right(problem, step, values))
        first.append(all(earlier is None or earlier.name != step.name for earlier in written[:index]))
        values[step.name] = step.result
    descendants: list[set[int]] = [set() for _ in written]
    for index in reversed(range(len(written))):
        for source in sources[index]:
            descendants[source] |= {index} | descendants[index]
    truths = []
    for index, step in enumerate(written):
        if step is None:
            truths.append(StepTruth(None))
            continue
        needed = first[index] and step.name in problem.needed
        users = sum(index in used for used in sources)
        matters = needed and problem.sensitivity[step.name] != 0
        truths.append(StepTruth(step.name, needed, right[index], matters, users, len(descendants[index])))
    return truths


def _origin(earlier: Sequence[_Written | None], name: str, value: int) -> int | None:
    writers = [index for index, step in enumerate(earlier) if step is not None and step.name == name]
    same = [index for index in writers if earlier[index].result == value]
    return same[0] if same else writers[-1] if writers else None


def _is_right(problem: DependencyProblem, step: _Written, values: dict[str, int]) -> bool:
    definition = problem.definitions.get(step.name)
    if definition is None:
        return False
    names = tuple(name for name, _ in step.operands)
    return (
        (names, step.sign) == ((definition.left, definition.right), definition.sign)
        and all(values.get(name) == value for name, value in step.operands)
        and step.result == (step.operands[0][1] + step.sign * step.operands[1][1]) % MODULUS
    )


def parse_problem(text: str) -> DependencyProblem:
    """A problem from its text, the inverse of `DependencyProblem.text`.

    Raises:
        ValueError: where the text is no dependency problem.
    """
    *lines, question = text.split(";")
    parsed = []
    for line in lines:
        if constant := re.fullmatch(r" ([a-z])(\d)", line):
            parsed.append((constant[1], int(constant[2])))
        elif definition := re.fullmatch(r" ([a-z]) ([a-z]) ([-+]) ([a-z])", line):
            name, left, sign, right = definition.groups()
            parsed.append(Definition(name, left, 1 if sign == "+" else -1, right))
        else:
            raise ValueError(f"line {line!r} is neither a constant, ' a4', nor a definition, ' c a + b'.")
    asked = re.fullmatch(r" ([a-z])\?", question)
    if asked is None:
        raise ValueError(f"question {question!r} is not a variable and '?', as in ' c?'.")
    return DependencyProblem(tuple(parsed), asked[1])
