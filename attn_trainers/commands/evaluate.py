r"""Evaluation of a model on mathematical benchmarks: pass@1 averaged over K samples, pass@k, lengths.

    attn-trainers evaluate --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --data aime24.jsonl math500.jsonl \
        --output_dir runs/evaluation/base

A model is a local folder, a Hub id or a LoRA adapter (merged into its base model in a temporary folder for vLLM). Each
data file has a `problem` and an `answer` (a text, or a list of accepted ones) per line. K is 32 for aime24, aime25 and
amc23 and 4 for the others, as in the AttnRL paper; `--num_samples` sets it for all. A run that was cut off goes on
where it stopped.

    attn-trainers evaluate --compare runs/evaluation/base runs/evaluation/attnrl --output_dir runs/evaluation

compares two runs and leaves `comparison.md` in the output folder.

With `--write_card true` the table and the command go into the card of a model in a local folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.card import public_command, write_evaluation
from ..base.results import summary_results
from ..evaluation.run import EvaluationArguments, compare_runs, evaluate
from ..evaluation.statistics import comparison_table, summary_table
from ..launch.command import run_command


PROG = "attn-trainers evaluate"


@dataclass
class Arguments(EvaluationArguments):
    """What to evaluate, and where to put the result."""

    write_card: bool = field(
        default=False, metadata={"help": "Put the table and the command into the model's card (a local folder)."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, or compare two evaluations, and print the table."""
    argv = sys.argv[1:] if argv is None else argv

    def run(args: Arguments) -> None:
        if args.compare:
            print(compare(args))
            return
        summaries = evaluate(args)
        if args.write_card:
            table, results = summary_table(summaries), summary_results(summaries)
            write_evaluation(args.model, table, public_command(PROG, argv), results)
        print((Path(args.output_dir) / "report.md").read_text())

    run_command(run, Arguments, argv, PROG, __doc__)


def compare(args: Arguments) -> str:
    """Compare two evaluations, save the table and return it with a line on where it is."""
    table = comparison_table(compare_runs(*args.compare))
    path = Path(args.output_dir) / "comparison.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"First: {args.compare[0]}, second: {args.compare[1]}\n\n{table}")
    return f"{table}\nSaved to {path}."
