"""The command line of the tools beside training: one line and exit code 2 for what cannot work."""

import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from transformers import HfArgumentParser


logger = logging.getLogger(__name__)


class OneLineParser(HfArgumentParser):
    """Refuses in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Refused: {' '.join(message.split())} (--help lists the options)\n")


def run_command(
    main: Callable, arguments_class: type, argv: Sequence[str] | None = None, prog: str | None = None
) -> None:
    """Parse the command line into `arguments_class` and call `main` with it.

    Args:
        main: takes the parsed arguments.
        arguments_class: a dataclass whose fields are the options.
        argv: the options, where they are not those of the process.
        prog: what the help calls the command, where that is not the script's name.

    Raises:
        SystemExit: with code 2 and one line on stderr, for an unknown option, a value of the wrong kind, settings that
            are refused with a ValueError, or files that cannot be read.
    """
    parser = OneLineParser(arguments_class, allow_abbrev=False, prog=prog)
    try:
        args, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown option {' '.join(unknown)}")
        main(args)
    except (ValueError, OSError) as error:
        logger.debug("Refused", exc_info=True)
        parser.exit(2, f"Refused: {' '.join(str(error).split())}\n")
