"""The command line of the recipes on small tasks: `--task` decides which defaults hold."""

from argparse import ArgumentParser
from typing import Any

from ..tiny.runs import TinyArguments
from .command import refusal_in_a_line
from .recipe import RecipeParser


def parse_task(classes: tuple[type, ...], dependencies: dict[str, Any]) -> tuple:
    """Parse a recipe's command line, whose `--task` decides which defaults hold.

    Args:
        classes: the recipe's dataclasses, a `TinyArguments` among them.
        dependencies: what is set, unless given, for `--task dependencies`.

    Raises:
        SystemExit: with code 2 for what is refused, so where the task is named in a config file, which is read after
            the defaults are chosen.
    """
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--task", default="chain")
    asked = early.parse_known_args()[0].task
    with refusal_in_a_line():
        parser = RecipeParser(classes, allow_abbrev=False)
        if asked == "dependencies":
            parser.set_defaults(**dependencies)
        parsed = parser.parse_args_and_config()
        (tiny,) = [part for part in parsed if isinstance(part, TinyArguments)]
        if tiny.task != asked:
            raise ValueError(
                f"task={tiny.task!r} stands in a config file; give --task {tiny.task} on the command line."
            )
        return parsed
