"""The tasks that the tiny recipes train on: their problems, their warm start, and what is known of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .arithmetic import RECHECK, Problem, WarmStart, sample_problems, warm_start
from .dependencies import DependencyProblem, sample_distinct
from .dependency_start import DependencyStart, dependency_warm_start
from .truth import parse_problem, read_truth


class Task(ABC):
    """A task of the tiny recipes."""

    title: str  # for tables and cards
    step_truth: Callable[[dict[str, Any], Sequence[str]], list[float]] | None = None  # see `AttnRLTrainer`

    @abstractmethod
    def problems(self, count: int, seed: int, exclude: set[str] = frozenset()) -> list:
        """So many different problems (each with `text` and `answer`), none of whose texts is in `exclude`."""

    @abstractmethod
    def warm_start(self, cache_dir: str | Path, exclude: set[str]) -> Path:
        """Folder of the warm-started model, trained or found in the cache."""

    @abstractmethod
    def needed(self, problem, steps: Sequence[str]) -> list[bool]:
        """Which of a solution's thinking steps its answer needs."""


class ChainTask(Task):
    """Multi-step arithmetic: every operation is needed, re-checks are not."""

    title = "multi-step arithmetic made on the spot"

    def __init__(self, settings: WarmStart):
        self.settings = settings

    def problems(self, count: int, seed: int, exclude: set[str] = frozenset()) -> list[Problem]:
        return sample_problems(count, seed, self.settings.num_operations, self.settings.max_start, exclude)

    def warm_start(self, cache_dir: str | Path, exclude: set[str]) -> Path:
        return warm_start(self.settings, cache_dir, exclude)

    def needed(self, problem: Problem, steps: Sequence[str]) -> list[bool]:
        return [not step.startswith(RECHECK) for step in steps]


def dependency_step_truth(example: dict[str, Any], steps: Sequence[str]) -> list[float]:
    """The oracle of `AttnRLTrainer(step_truth=...)`: 1 for steps in which an error can change the answer, else 0.

    Args:
        example: a row of the data set, whose prompt is the problem.
        steps: texts of all steps of a completion; those that end thinking or follow it count as 0.
    """
    problem = parse_problem(example["prompt"][-1]["content"])
    return [float(truth.matters) for truth in read_truth(problem, steps)]


class DependencyTask(Task):
    """Dependency arithmetic: the truth of every step is known."""

    title = "dependency arithmetic made on the spot"
    step_truth = staticmethod(dependency_step_truth)

    def __init__(self, settings: DependencyStart):
        self.settings = settings

    def problems(self, count: int, seed: int, exclude: set[str] = frozenset()) -> list[DependencyProblem]:
        return sample_distinct(count, seed, self.settings.size, exclude)

    def warm_start(self, cache_dir: str | Path, exclude: set[str]) -> Path:
        return dependency_warm_start(self.settings, cache_dir, exclude)

    def needed(self, problem: DependencyProblem, steps: Sequence[str]) -> list[bool]:
        return [truth.needed for truth in read_truth(problem, steps)]
