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

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from attn_trainers.attnpo.discovery.comparison import compare_heads
from attn_trainers.attnpo.discovery.pictures import (
    plot_comparison,
    plot_ensembles,
    plot_head_map,
    plot_intervention,
)
from attn_trainers.attnpo.discovery.run import DiscoveryArguments, discover_heads
from attn_trainers.attnpo.discovery.summary import discovery_text


@dataclass
class CompareArguments:
    """Two discoveries to compare."""

    compare: list[str] = field(metadata={"help": "Output folders of two discoveries."})
    output: str = field(default="runs/heads_moved", metadata={"help": "Folder for what is found."})

    def __post_init__(self):
        if len(self.compare) != 2:
            raise ValueError(f"compare={self.compare} must be two folders; give the outputs of two discoveries.")


def main(args: DiscoveryArguments) -> None:
    """Find the heads, draw the pictures and print the ranking."""
    heads, report, held_out = discover_heads(args)
    output = Path(args.output)
    plot_head_map(report, list(heads.heads), output / "head_map.png")
    plot_ensembles(report, output / "ensembles.png")
    if report.intervention:
        plot_intervention(report.intervention, output / "intervention.png")
    print(discovery_text(heads, report, held_out))
    print(f"Heads file: {output / 'heads.json'}")


def compare(args: CompareArguments) -> None:
    """Say how the ranking moved between two models."""
    comparison = compare_heads(*args.compare)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    plot_comparison(comparison, output / "comparison.png")
    print(
        f"SRA over {len(comparison.first_sra)} heads (criterion {comparison.criterion}): Pearson "
        f"{comparison.pearson:.3f}, Spearman {comparison.spearman:.3f}\n"
        f"Chosen heads {comparison.first_heads} and {comparison.second_heads}: {comparison.num_shared} shared, "
        f"overlap {comparison.overlap:.2f}"
    )


if __name__ == "__main__":
    if "--compare" in sys.argv:
        compare(HfArgumentParser(CompareArguments).parse_args_into_dataclasses()[0])
    else:
        main(HfArgumentParser(DiscoveryArguments).parse_args_into_dataclasses()[0])
