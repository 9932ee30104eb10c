"""Credit methods by name, with their settings on the command line of a recipe that trains on trees."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import yaml

from ..attnpo.method import AttnPOCredit
from ..attnpo.options import AttnPOOptions
from ..base.config import MethodConfig
from ..base.credit import CreditMethod
from ..base.options import require_choice
from ..rhythm.method import RhythmCredit
from ..rhythm.options import RhythmOptions


CREDITS: dict[str, tuple[type, type[CreditMethod]]] = {
    "attnpo": (AttnPOOptions, AttnPOCredit),
    "rhythm": (RhythmOptions, RhythmCredit),
}
# Fields that mean the same to a trainer and to a credit method: set once, for both.
SHARED = ("accuracy_reward", "end_of_thinking", "success_threshold")


def chosen_credit(argv: Sequence[str] | None = None) -> str:
    """Name of the credit method on the command line or in the YAML file of `--config`, "none" by default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--credit")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if known.credit is None and known.config is not None and Path(known.config).is_file():
        known.credit = (yaml.safe_load(Path(known.config).read_text()) or {}).get("credit")
    return known.credit or "none"


def credit_arguments(name: str, config_class: type[MethodConfig]) -> type:
    """Dataclass of the arguments `credit` and, of a credit method, each of its own settings.

    A setting that the trainer has under the same name is the trainer's where it means the same (`SHARED`), else it is
    called `credit_<name>`.

    Args:
        name: of the credit method; for an unknown one there are no settings, and the parser refuses the name.
        config_class: settings of the trainer.
    """
    choices = ["none", *CREDITS]
    help_text = f"Credit method that weighs tree advantages: {', '.join(choices)}; its settings are options too."
    choice = field(default="none", metadata={"help": help_text, "choices": choices})
    own = [("credit", str, choice)]
    if name in CREDITS:
        option_fields = {one.name: one for one in fields(CREDITS[name][0])}
        for option, argument in _argument_names(name, config_class).items():
            if argument not in SHARED:
                one = option_fields[option]
                own.append((argument, one.type, field(default=one.default, metadata=dict(one.metadata))))
    return make_dataclass("CreditArguments", own)


def build_credit(arguments: object, args: MethodConfig) -> CreditMethod | None:
    """The credit method that parsed arguments describe; `None` for "none".

    Args:
        arguments: an instance of what `credit_arguments` made.
        args: settings of the trainer.

    Raises:
        ValueError: for an unknown name, settings out of range, or settings that do not go with trees.
    """
    require_choice("credit", arguments.credit, ["none", *CREDITS])  # the parser checks no name from a file
    if arguments.credit == "none":
        return None
    options_class, method_class = CREDITS[arguments.credit]
    names = _argument_names(arguments.credit, type(args))
    values = {
        option: getattr(args if argument in SHARED else arguments, argument) for option, argument in names.items()
    }
    credit = method_class(options_class(**values))
    credit.check_trees()
    return credit


def _argument_names(name: str, config_class: type[MethodConfig]) -> dict[str, str]:
    """Name on the command line of each setting of a credit method."""
    taken = {f.name for f in fields(config_class)}
    return {
        f.name: f"credit_{f.name}" if f.name in taken and f.name not in SHARED else f.name
        for f in fields(CREDITS[name][0])
    }
