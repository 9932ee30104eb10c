r"""What a model's attention says about its own responses, as one HTML page and pictures.

    attn-trainers inspect --model Qwen/Qwen3-4B-Base --data problems.jsonl --output_dir runs/inspection

The data are JSON lines with a `problem`; where a line has a `completion`, it is read as the response, otherwise one is
sampled. The page shows, for a few problems, WAAD and FAI over the tokens with preplan and anchor tokens, forward
context influence and key-focus scores over the steps, and over all problems the couplings of the rhythm paper's Table
2 with the densities of the peaks they are measured on. It is one file and needs no network.

`--perturb true` adds the paper's Table 1: other tokens are forced where FAI is highest and where it is lowest, and the
content words of the greedy continuations are compared with the response's own. This takes positions x candidates x 2
continuations per response; a run that was cut off goes on where it stopped.

`--tiny true` inspects the small model of the arithmetic recipes on their held-out problems, without `--model` and
`--data`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..inspection.run import InspectionArguments, run_inspection
from ..launch.command import run_command
from ..tiny.arithmetic import sample_problems
from ..tiny.runs import HELD_OUT_SEED, TinyArguments, prepare


@dataclass
class Arguments(InspectionArguments):
    """What is inspected."""

    tiny: bool = field(default=False, metadata={"help": "Inspect the arithmetic recipes' model on their problems."})


def tiny_arguments(args: Arguments) -> Arguments:
    """The arguments with the arithmetic model, where none is named, and a file of held-out problems."""
    data = Path(args.output_dir) / "problems.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    problems = sample_problems(args.num_problems, HELD_OUT_SEED)
    data.write_text("".join(json.dumps({"problem": p.text, "answer": p.answer}) + "\n" for p in problems))
    model = args.model or str(prepare(TinyArguments())[0])
    return replace(args, model=model, data=str(data), prompt_template="{problem}")


def inspect(args: Arguments) -> None:
    """Inspect, and print the tables."""
    print(run_inspection(tiny_arguments(args) if args.tiny else args))
    print(f"Page and pictures: {args.output_dir}")


def main(argv: Sequence[str] | None = None) -> None:
    """Inspect as the options say."""
    run_command(inspect, Arguments, argv, "attn-trainers inspect", __doc__)
