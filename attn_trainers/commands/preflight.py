"""Check a recipe's settings on this machine before a GPU is used, and print what the run will take.

    attn-trainers preflight [OPTIONS OF accelerate launch] RECIPE [OPTIONS OF THE RECIPE]

    attn-trainers preflight --config_file zero2 attnrl_1p5b --dataset problems.jsonl
    attn-trainers preflight attnrl_1p5b --config mine.yaml

Rows and tokens per step, memory per rank, data, chat template, vocabulary. Nothing of the model is loaded but its
config. What cannot work is one line, and exit code 2.
"""

import sys
from collections.abc import Sequence

from .train import launch


def main(argv: Sequence[str] | None = None) -> None:
    """Launch the recipe with `--preflight`."""
    launch(sys.argv[1:] if argv is None else argv, "preflight", __doc__, ["--preflight", "true"])
