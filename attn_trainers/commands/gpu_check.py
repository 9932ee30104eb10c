r"""`attn-trainers gpu-check`: what must hold on a GPU, measured and asserted in at most 25 minutes, without a network.

    attn-trainers gpu-check [--model FOLDER] [--only NAME ...] [--output runs/gpu_check]
    attn-trainers gpu-check --smoke        # tiny shapes, on a CPU too

docs/gpu.md says what each check asserts.
"""

from collections.abc import Sequence

from ..gpu_check.run import GpuCheckArguments, run
from ..launch.command import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and run the checks; exit code 1 where one fails, 2 for options that cannot work."""
    run_command(run, GpuCheckArguments, argv, "attn-trainers gpu-check", __doc__)


if __name__ == "__main__":
    main()
