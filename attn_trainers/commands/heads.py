r"""Find a model's key-focus heads for AttnPO: those whose attention from the answer tells needed steps from redundant.

    attn-trainers heads --model Qwen/Qwen3-4B --data problems.jsonl --output_dir runs/heads
    attn-trainers heads --compare runs/heads runs/heads_after --output_dir runs/moved

The data is JSONL. Lines with `problem`, `completion` and `labels` ("essential", "redundant" or null per step) are used
as they are, and `label_source` says who labelled them; lines with `problem`, `answer` and `completion` are labelled
without another model; lines with `problem` and `answer` are solved by the model first, and easy ones kept. Completions
beside an answer are graded, wrong ones left out. A run that was cut off goes on where it stopped.

The output folder holds `heads.json` (for `--heads` of the AttnPO recipes), `report.json` (all heads with bootstrap
intervals, scores of position and length beside them, ensembles, held-out accuracy, the intervention), `labels.jsonl`,
`head_map.png`, `ensembles.png` and `intervention.png`.

`--compare A B` takes two such folders and says how the ranking moved: `comparison.json` and `comparison.png`.
"""

import sys
from collections.abc import Sequence

from ..attnpo.discovery.arguments import DiscoveryArguments
from ..attnpo.discovery.command import ComparisonArguments, compare, find
from ..launch.command import run_command


PROG = "attn-trainers heads"


def main(argv: Sequence[str] | None = None) -> None:
    """Find heads, or compare two findings, and print the ranking."""
    argv = sys.argv[1:] if argv is None else argv
    asked = (compare, ComparisonArguments) if "--compare" in argv else (find, DiscoveryArguments)
    run_command(*asked, argv, PROG, __doc__)
