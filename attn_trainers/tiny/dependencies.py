"""Dependency arithmetic: a reasoning task in which it is known which steps matter (after iGSM, arXiv 2407.20311).

A problem gives constants, defines variables as sums or differences of two others modulo 10, in shuffled order, and
asks for one. A solution computes one variable a paragraph; some variables are not needed for the question. What is
known of every step, without a judge, `truth.read_truth` reads from the text of any solution, a sampled one too.

Every value stands directly behind its variable, ` c a4 + b9 = c3`, so that looking a value up is plain induction.
"""

import random
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from .arithmetic import word_tokenizer


MODULUS = 10
NAMES = "abcdefghijklmnopqrstuvwxyz"
RECHECK = "Wait,"


@dataclass(frozen=True)
class Definition:
    """`name` is `left + right` or, with `sign` -1, `left - right`, modulo 10."""

    name: str
    left: str
    sign: int
    right: str

    @property
    def text(self) -> str:
        return f" {self.name} {self.left}{_sign(self.sign)} {self.right}"

    def result(self, left: int, right: int) -> int:
        return (left + self.sign * right) % MODULUS


def _sign(sign: int) -> str:
    return " +" if sign > 0 else " -"


@dataclass(frozen=True)
class DependencyProblem:
    """Constants and definitions in the order in which the text gives them, and the variable that is asked for.

    Attributes:
        lines: what the text gives, a (name, value) pair for a constant.
        question: a defined variable.
    """

    lines: tuple[tuple[str, int] | Definition, ...]
    question: str

    @property
    def text(self) -> str:
        lines = [line.text if isinstance(line, Definition) else f" {line[0]}{line[1]}" for line in self.lines]
        return "".join(line + ";" for line in lines) + f" {self.question}?"

    @cached_property
    def constants(self) -> dict[str, int]:
        return dict(line for line in self.lines if not isinstance(line, Definition))

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        return {line.name: line for line in self.lines if isinstance(line, Definition)}

    @cached_property
    def values(self) -> dict[str, int]:
        """The true value of every variable."""
        values = dict(self.constants)

        def value(name: str) -> int:
            if name not in values:
                definition = self.definitions[name]
                values[name] = definition.result(value(definition.left), value(definition.right))
            return values[name]

        for name in self.definitions:
            value(name)
        return values

    @cached_property
    def needed(self) -> frozenset[str]:
        """Defined variables that the question depends on, itself included."""
        found, waiting = set(), [self.question]
        while waiting:
            name = waiting.pop()
            if name in self.definitions and name not in found:
                found.add(name)
                waiting += [self.definitions[name].left, self.definitions[name].right]
        return frozenset(found)

    @cached_property
    def sensitivity(self) -> dict[str, int]:
        """By how much the answer changes, modulo 10, where a variable is 1 too large; for every defined variable."""
        users: dict[str, list[tuple[Definition, int]]] = {name: [] for name in self.values}
        for definition in self.definitions.values():
            users[definition.left].append((definition, 1))
            users[definition.right].append((definition, definition.sign))
        known: dict[str, int] = {}

        def change(name: str) -> int:
            if name not in known:
                through = sum(sign * change(user.name) for user, sign in users[name])
                known[name] = (through + (name == self.question)) % MODULUS
            return known[name]

        return {name: change(name) for name in self.definitions}

    @property
    def answer(self) -> str:
        return str(self.values[self.question])


@dataclass(frozen=True)
class ProblemSize:
    """How large problems are.

    Attributes:
        needed: defined variables that the question depends on.
        unneeded: further defined variables.
        constants: variables with a given value.
        hubs: how unequally variables are used by others: 0 all alike; at 2, a few have most of the users.
        shuffled: whether definitions stand in any order. A small model does not learn in minutes which of them can be
            computed next; otherwise each stands behind its operands, in one of the orders that allow it.
    """

    needed: int = 15
    unneeded: int = 7
    constants: int = 4
    hubs: float = 2.0
    shuffled: bool = False

    def __post_init__(self):
        if min(self.needed, self.constants - 1) < 1 or self.unneeded < 0:
            raise ValueError(f"{self}: needed must be at least 1, constants at least 2, unneeded at least 0.")
        if self.needed + self.unneeded + self.constants > len(NAMES):
            raise ValueError(
                f"{self} names {self.needed + self.unneeded + self.constants} variables; there are {len(NAMES)} names:"
                " lower one of the sizes."
            )


def sample_dependencies(rng: random.Random, size: ProblemSize = ProblemSize()) -> DependencyProblem:  # noqa: B008
    """Draw a problem: every needed variable has a user among the later ones, other operands are drawn by weight."""
    total = size.constants + size.needed + size.unneeded
    names = rng.sample(NAMES, total)
    constants, needed = names[: size.constants], names[size.constants : size.constants + size.needed]
    weight = {name: rng.expovariate(1.0) ** size.hubs for name in names}
    operands: dict[str, list[str]] = {name: [] for name in needed}
    for i in reversed(range(size.needed - 1)):
        user = rng.choice([name for name in needed[i + 1 :] if len(operands[name]) < 2])
        operands[user].append(needed[i])
    operands |= {name: [] for name in names[size.constants + size.needed :]}
    earlier, definitions = list(constants), []
    for name, given in operands.items():
        while len(given) < 2:
            free = [other for other in earlier if other not in given]
            given += rng.choices(free, [weight[other] for other in free])
        rng.shuffle(given)
        definitions.append(Definition(name, given[0], rng.choice((1, -1)), given[1]))
        earlier.append(name)
    lines = [(name, rng.randrange(MODULUS)) for name in constants] + definitions
    rng.shuffle(lines)
    return DependencyProblem(tuple(lines if size.shuffled else _behind_operands(lines)), needed[-1])


def _behind_operands(lines: list) -> list:
    """The lines in the order given, but that a definition waits for its operands."""
    placed, told, waiting = [], set(), list(lines)
    while waiting:
        line = next(one for one in waiting if not isinstance(one, Definition) or {one.left, one.right} <= told)
        waiting.remove(line)
        placed.append(line)
        told.add(line.name if isinstance(line, Definition) else line[0])
    return placed


def sample_distinct(
    count: int, seed: int, size: ProblemSize, exclude: set[str] = frozenset()
) -> list[DependencyProblem]:
    """Draw `count` different problems, none of whose texts is in `exclude`."""
    rng = random.Random(seed)
    seen, problems = set(exclude), []
    while len(problems) < count:
        problem = sample_dependencies(rng, size)
        if problem.text not in seen:
            seen.add(problem.text)
            problems.append(problem)
    return problems


@dataclass(frozen=True)
class Teacher:
    """How solutions are written.

    Attributes:
        noise: probability that a written result is wrong; what follows goes on from it.
        detour: probability that an unneeded variable is computed too.
        recheck: probability that a step is followed by itself once more.
    """

    noise: float = 0.02
    detour: float = 0.8
    recheck: float = 0.1


def write_dependencies(problem: DependencyProblem, rng: random.Random, teacher: Teacher) -> str:
    """A solution: at each time the first variable of the text that can be computed, until the question's is known."""
    values, paragraphs = dict(problem.constants), []
    waiting = {name for name in problem.definitions if name in problem.needed or rng.random() < teacher.detour}
    while problem.question in waiting:
        definition = next(
            definition
            for definition in problem.definitions.values()
            if definition.name in waiting and definition.left in values and definition.right in values
        )
        left, right = values[definition.left], values[definition.right]
        result = definition.result(left, right)
        if rng.random() < teacher.noise:
            result = (result + rng.randrange(1, MODULUS)) % MODULUS
        values[definition.name] = result
        waiting.remove(definition.name)
        step = f" {definition.name} {definition.left}{left}{_sign(definition.sign)} {definition.right}{right}"
        paragraphs.append(f"{step} = {definition.name}{result}")
        if rng.random() < teacher.recheck:
            paragraphs.append(RECHECK + paragraphs[-1])
    restated = [f" {name}{value}" for name, value in values.items() if name in problem.needed]
    return "\n\n".join(paragraphs) + "\n\n</think>" + "".join(restated) + f"\\boxed{{{values[problem.question]}}}"


def build_dependency_tokenizer() -> PreTrainedTokenizerFast:
    """Lossless word-level tokenizer: a variable (with the space before it), a digit and a sign are one token each."""
    words = ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "\n\n", "\\boxed{", "}", RECHECK, ";", "?"]
    words += [" +", " -", " ="] + [str(n) for n in range(MODULUS)] + [f" {name}" for name in NAMES]
    return word_tokenizer(words, rf"\n\n|</?think>|\\boxed\{{|\}}|{RECHECK}| [-+=]|[;?]|\d| [a-z]")
