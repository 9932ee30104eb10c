"""Recipes and accelerate configs by their names, and `accelerate launch` of them."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .command import refuse


# Beside the package's rooms, in a checkout as links to the top folders of the same names.
RECIPES = Path(__file__).parents[1] / "recipes"
ACCELERATE_CONFIGS = RECIPES.parent / "accelerate_configs"
_TOOLS = ("evaluate", "find_key_focus_heads", "inspect_attention", "probe_branching")


def recipe_names() -> list[str]:
    """Names of the recipes that train."""
    return sorted(path.stem for path in RECIPES.glob("*.py") if path.stem not in _TOOLS)


def find_recipe(name: str) -> Path:
    """File of a recipe by its name, or a file of one's own.

    Raises:
        ValueError: if there is neither.
    """
    return _find("recipe", name, RECIPES, ".py", recipe_names())


def find_accelerate_config(name: str) -> Path:
    """File of an accelerate config by its name, or a file of one's own.

    Raises:
        ValueError: if there is neither.
    """
    return _find(
        "config_file", name, ACCELERATE_CONFIGS, ".yaml", sorted(p.stem for p in ACCELERATE_CONFIGS.iterdir())
    )


def _find(what: str, name: str, folder: Path, suffix: str, names: Sequence[str]) -> Path:
    if name in names:
        return folder / f"{name}{suffix}"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"{what}={name!r} is no file and no name; give a file, or one of {', '.join(names)}.")


def launch_recipe(argv: Sequence[str], prog: str, more: Sequence[str] = ()) -> None:
    """`accelerate launch` with names: of the recipe in place of the script, of a config behind `--config_file`.

    Args:
        argv: options of `accelerate launch`, the recipe, options of the recipe.
        prog: what the help calls the command.
        more: further options of the recipe.

    Raises:
        ValueError: for an unknown name.
        SystemExit: with the exit code of the recipe where that is not 0, and with 2 for options that are wrong.
    """
    # Only here, so that names can be looked up in an instant.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    parser.prog, parser.error = prog, _refuse_option
    args = parser.parse_args(list(argv))
    args.training_script = str(find_recipe(args.training_script))
    if args.config_file is not None:
        args.config_file = str(find_accelerate_config(args.config_file))
    args.training_script_args = [*args.training_script_args, *more]
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:  # one rank: it has said itself what was wrong
        raise SystemExit(error.returncode) from None
    except ChildFailedError as error:
        raise SystemExit(error.get_first_failure()[1].exitcode) from None


def _refuse_option(message: str) -> NoReturn:
    refuse(f"{message} (options of `accelerate launch` stand before the recipe, those of the recipe behind it)")


def help_text(description: str) -> str:
    """The help of a command that launches a recipe."""
    configs = sorted(path.stem for path in ACCELERATE_CONFIGS.iterdir())
    return "\n".join(
        [
            description.strip(),
            "",
            f"Recipes: {', '.join(recipe_names())} (in {RECIPES}; copy one to change it, and give its path)",
            f"Accelerate configs: {', '.join(configs)}",
        ]
    )
