r"""Has attention branching anything to say on a model and its data? Told by sampling alone, before any training.

    attn-trainers branching --model Qwen/Qwen2.5-1.5B-Instruct --data problems.jsonl --output_dir runs/branching

Initial rollouts are sampled once; then each branching criterion chooses its points, and the same number of
continuations is sampled at each. The table says where the points lie, how many trees and prompts have right and wrong
answers, and what a mixed tree costs; its last lines say in words what that means. `--disrupt true` replaces steps by
corrupted ones and shows how much their influence says about the answers. A run that was cut off goes on where it
stopped.
"""

from collections.abc import Sequence

from ..launch.command import run_command
from ..probes.arguments import BranchingArguments
from ..probes.run import run_branching


def run(args: BranchingArguments) -> None:
    """Probe, and print the tables."""
    print(run_branching(args))
    print(f"Tables, picture and JSON: {args.output_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    """Probe as the options say."""
    run_command(run, BranchingArguments, argv, "attn-trainers branching", __doc__)
