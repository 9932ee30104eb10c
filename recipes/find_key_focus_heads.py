r"""Find a model's key-focus heads for AttnPO: those whose attention from the answer tells needed steps from redundant.

    python recipes/find_key_focus_heads.py --model Qwen/Qwen3-4B --data problems.jsonl --output runs/heads

The data is JSONL. Lines with `problem`, `completion` and `labels` ("essential", "redundant" or null per step) are used
as they are; lines with `problem`, `answer` and `completion` are labelled without another model; lines with `problem`
and `answer` are solved by the model first, and easy ones kept. A run that was cut off goes on where it stopped.

The output folder holds `heads.json` (for `--heads` of the AttnPO recipes), `report.json` (all heads with bootstrap
intervals, ensembles, held-out accuracy), `labels.jsonl`, `head_map.png` and `ensembles.png`.
"""

from pathlib import Path

from transformers import HfArgumentParser

from attn_trainers.attnpo.discovery.pictures import plot_ensembles, plot_head_map
from attn_trainers.attnpo.discovery.run import DiscoveryArguments, discover_heads


def main(args: DiscoveryArguments) -> None:
    """Find the heads, draw the pictures and print the ranking."""
    heads, report, held_out = discover_heads(args)
    output = Path(args.output)
    plot_head_map(report, list(heads.heads), output / "head_map.png")
    plot_ensembles(report, output / "ensembles.png")
    print(f"{report.num_responses} responses, {report.num_pairs} pairs of steps, SRA by {report.average} average")
    for layer, head in report.ranking[:10]:
        index = layer * report.num_heads + head
        chosen = " (chosen)" if (layer, head) in heads.heads else ""
        interval = f"{report.lower[index]:.3f} to {report.upper[index]:.3f}"
        print(f"  [{layer}, {head}]  SRA {report.sra[index]:.3f}, 95 % {interval}{chosen}")
    if held_out:
        print(
            f"Held out, {held_out.num_responses} responses: chosen heads {held_out.chosen:.3f} "
            f"({held_out.lower:.3f}-{held_out.upper:.3f}), best single {held_out.best_single:.3f}, "
            f"median head {held_out.median:.3f}"
        )
    print(f"Heads file: {output / 'heads.json'}")


if __name__ == "__main__":
    main(HfArgumentParser(DiscoveryArguments).parse_args_into_dataclasses()[0])
