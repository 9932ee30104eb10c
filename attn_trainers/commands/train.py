"""Train by a recipe: `accelerate launch` with the names of recipes and accelerate configs.

    attn-trainers train [OPTIONS OF accelerate launch] RECIPE [OPTIONS OF THE RECIPE]

    attn-trainers train --config_file zero2 attnrl_1p5b --max_steps 100
    attn-trainers train --config_file zero2 --num_processes 4 my_recipe.py --config mine.yaml

`attn-trainers train RECIPE --help` lists the options of a recipe. Any of them can stand in a YAML file (`--config`).
"""

import sys
from collections.abc import Sequence

from ..launch.command import refusal_in_a_line
from ..launch.launcher import help_text, launch_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the recipe."""
    launch(sys.argv[1:] if argv is None else argv, "train", __doc__)


def launch(argv: Sequence[str], command: str, description: str, more: Sequence[str] = ()) -> None:
    """Launch a recipe with further options, or print the help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text(description))
        return
    with refusal_in_a_line():
        launch_recipe(argv, f"attn-trainers {command}", more)
