"""The checks by name, and what one finds."""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


class Skipped(Exception):
    """A check cannot be made here; the message is the reason."""


@dataclass(frozen=True)
class Context:
    """What all checks of a run share.

    Attributes:
        device: "cuda" or "cpu".
        smoke: tiny shapes, and no goals that only a GPU can reach.
        folder: of the run; models that are made for it lie there.
        model: folder of a real model, in place of the random one of a 1.5B's shape.
        steps: findings of the trainers' steps made before, by check: what `step_time` compares.
    """

    device: str
    smoke: bool
    folder: Path
    model: str | None = None
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Context":
        fields = json.loads(text)
        return cls(**fields | {"folder": Path(fields["folder"])})


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: what was measured, with its unit.
        measured: the value.
        least, most: what it is held against; neither for a value that is only told.
    """

    what: str
    measured: float
    least: float | None = None
    most: float | None = None

    @property
    def goal(self) -> str:
        """The goal in words."""
        bounds = {"at least": self.least, "at most": self.most}
        return ", ".join(f"{word} {bound:.4g}" for word, bound in bounds.items() if bound is not None)

    @property
    def status(self) -> str:
        """Whether the goal is met, "measured" where there is none; a value that is no number meets none."""
        if self.least is None and self.most is None:
            return "measured"
        above = self.least is None or self.measured >= self.least
        below = self.most is None or self.measured <= self.most
        return "pass" if above and below else "fail"


@dataclass(frozen=True)
class Check:
    """A check of the registry.

    Attributes:
        name: for `--only` and the table.
        run: measures, and returns findings.
        seconds: after which it is ended, on a GPU.
        needs_cuda: why it cannot run without a GPU, empty where it can.
        in_smoke: whether `--smoke` runs it.
    """

    name: str
    run: Callable[[Context], list[Finding]]
    seconds: int
    needs_cuda: str = ""
    in_smoke: bool = True

    @property
    def purpose(self) -> str:
        """First line of the function's docstring."""
        return self.run.__doc__.strip().splitlines()[0].rstrip(".") if self.run.__doc__ else self.name


CHECKS: dict[str, Check] = {}


def load_checks() -> dict[str, Check]:
    """All checks in the order in which they run: the cheap ones first, `step_time` after what it compares."""
    for module in ("signals", "engine", "training"):
        importlib.import_module(f".{module}", __package__)
    return CHECKS


def check(name: str, seconds: int, *, needs_cuda: str = "", in_smoke: bool = True) -> Callable:
    """Enter a function into the registry; checks run in the order in which they are entered."""

    def enter(run: Callable[[Context], list[Finding]]) -> Callable:
        CHECKS[name] = Check(name, run, seconds, needs_cuda, in_smoke)
        return run

    return enter


def on_gpu(context: Context, what: str, measured: float, most: float | None = None, least: float | None = None):
    """A finding whose goal holds on a GPU with the real shapes; in a smoke run it is told without one."""
    return Finding(what, measured) if context.smoke else Finding(what, measured, least, most)
