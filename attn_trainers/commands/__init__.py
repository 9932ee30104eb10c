"""The command line `attn-trainers`: what is asked of models and runs, one module per command.

Each module has a `main(argv)`; it is imported when its command is called, so that `attn-trainers --help` is instant.
"""

import importlib
import sys
from collections.abc import Sequence

from .. import __version__


COMMANDS = {
    "evaluate": "pass@1 and pass@k of a model on benchmark files, or two such evaluations compared",
    "heads": "find the key-focus heads that AttnPO needs, or compare those of two models",
    "inspect": "a page of what a model's attention says about its own responses",
    "branching": "whether attention branching has a say on a model and data, before any training",
    "train": "train by a recipe: attn-trainers train --config_file zero2 attnrl_1p5b",
    "preflight": "check a recipe's settings before a GPU is used: rows, tokens, memory, data, template",
    "gpu-check": "measure and assert on this machine's GPU what a CPU cannot show",
}


def module_of(command: str) -> str:
    """Full name of the module that holds a command."""
    return f"{__name__}.{command.replace('-', '_')}"


def help_text() -> str:
    """What `attn-trainers --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: attn-trainers COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "attn-trainers COMMAND --help lists a command's options; attn-trainers --version tells the release.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Call the command that the first argument names with the others.

    Args:
        argv: command and options, where they are not those of the process.

    Raises:
        SystemExit: with code 2, without a command or with an unknown one.
    """
    first, *rest = (sys.argv[1:] if argv is None else argv) or [None]
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version":
        print(f"attn_trainers {__version__}")
    elif first is None:
        print(help_text(), file=sys.stderr)
        raise SystemExit(2)
    elif first in COMMANDS:
        importlib.import_module(module_of(first)).main(rest)
    else:
        print(f"Refused: {first!r} is no command; choose from {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
