r"""Find a model's key-focus heads for AttnPO: those whose attention from the answer tells needed steps from redundant.

    python recipes/find_key_focus_heads.py --model Qwen/Qwen3-4B --data problems.jsonl --output runs/heads
    python recipes/find_key_focus_heads.py --compare runs/heads runs/heads_after --output runs/moved

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

from attn_trainers.attnpo.discovery.arguments import DiscoveryArguments
from attn_trainers.attnpo.discovery.command import ComparisonArguments, compare, find
from attn_trainers.launch.command import run_command


if __name__ == "__main__":
    if "--compare" in sys.argv:
        run_command(compare, ComparisonArguments)
    else:
        run_command(find, DiscoveryArguments)
