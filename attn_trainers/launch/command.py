"""What every command line of the package has: one line and exit code 2 for what cannot work."""

import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from transformers import HfArgumentParser


logger = logging.getLogger(__name__)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the defaults of the options, and the description as it is written."""


class OneLineErrors:
    """Mixin of an argument parser: refuses in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists the options)")


class OneLineParser(OneLineErrors, HfArgumentParser):
    """The parser of a tool."""


def refuse(message: object) -> NoReturn:
    """End the process with code 2 and, on the first rank, one line on stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(f"Refused: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextmanager
def refusal_in_a_line() -> Iterator[None]:
    """`refuse` where settings are refused with a ValueError, or a file cannot be read."""
    try:
        yield
    except (ValueError, OSError) as error:
        logger.debug("Refused", exc_info=True)
        refuse(error)


def run_command(
    main: Callable,
    arguments_class: type,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> None:
    """Parse the command line into `arguments_class` and call `main` with it.

    Args:
        main: takes the parsed arguments.
        arguments_class: a dataclass whose fields are the options.
        argv: the options, where they are not those of the process.
        prog: what the help calls the command, where that is not the script's name.
        description: what the help says before the options, as it is.

    Raises:
        SystemExit: with code 2 and one line on stderr, for an unknown option, a value of the wrong kind, settings that
            are refused with a ValueError, or files that cannot be read.
    """
    parser = OneLineParser(
        arguments_class, allow_abbrev=False, prog=prog, description=description, formatter_class=HelpFormatter
    )
    with refusal_in_a_line():
        args, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown option {' '.join(unknown)}")
        main(args)
