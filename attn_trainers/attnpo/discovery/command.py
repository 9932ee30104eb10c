"""The two things that are asked of a head discovery on the command line: find heads, compare two findings."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .arguments import DiscoveryArguments
from .comparison import compare_heads
from .pictures import plot_comparison, plot_ensembles, plot_head_map, plot_intervention
from .run import discover_heads
from .summary import comparison_text, discovery_text


@dataclass
class ComparisonArguments:
    """Two discoveries to compare."""

    compare: list[str] = field(metadata={"help": "Output folders of two discoveries."})
    output_dir: str = field(default="runs/heads_moved", metadata={"help": "Folder for what is found."})

    def __post_init__(self):
        if len(self.compare) != 2:
            raise ValueError(f"compare={self.compare} must be two folders; give the outputs of two discoveries.")


def find(args: DiscoveryArguments) -> None:
    """Find the heads, draw the pictures into the output folder and print the ranking."""
    heads, report, held_out = discover_heads(args)
    output = Path(args.output_dir)
    plot_head_map(report, heads.heads, output / "head_map.png")
    plot_ensembles(report, output / "ensembles.png")
    if report.intervention:
        plot_intervention(report.intervention, output / "intervention.png")
    print(discovery_text(heads, report, held_out))
    print(f"\nHeads file: {output / 'heads.json'}")


def compare(args: ComparisonArguments) -> None:
    """Say how the ranking moved between two models: `comparison.json` and `comparison.png` in the output folder."""
    comparison = compare_heads(*args.compare)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n")
    plot_comparison(comparison, output / "comparison.png")
    print(comparison_text(comparison))
