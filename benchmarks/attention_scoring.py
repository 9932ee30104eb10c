"""What the attention signals cost, against the forward they are read in.

    python benchmarks/attention_scoring.py                          # forward, forward with FCI, eager maps
    python benchmarks/attention_scoring.py --heads 3 --rhythm       # key-focus scores and rhythm as well
    python benchmarks/attention_scoring.py --lengths 1024 2048 4096 --steps 60 270

Prints one row per length, number of steps and way. Times: ways take turns in one process, so that other load falls on
all alike; the median over the repeats, and the median and range of each repeat's ratio to its own plain forward. On a
CPU the time is the process's CPU time, which other load changes less than the time on the wall. Peak memory: a fresh
process per way, its highest resident set (CPU) or allocation (CUDA); "own" is the part above the loaded model.

On a CPU the model has 6 layers, 12 heads of 64, float32; on CUDA the shape of a 1.5B Qwen2, bfloat16. Weights are
random.
"""

import argparse
import json
import statistics
import subprocess
import sys


WAYS = {
    "plain": "plain forward",
    "fci": "forward + FCI",
    "heads": "forward + key-focus scores",
    "rhythm": "forward + rhythm",
    "rhythm_alone": "forward for rhythm alone",
    "eager": "eager maps + einsum",
}


def main() -> None:
    args = parse_args()
    if args.worker:
        from attn_trainers.gpu_check.attention_cost import measure

        print(json.dumps(measure(json.loads(args.worker))))
        return
    ways = ["plain", "fci"] + ["heads"] * bool(args.heads) + ["rhythm", "rhythm_alone"] * args.rhythm
    header = ("tokens", "steps", "way", "time", "x plain", "range", "peak MiB", "x plain", "own MiB", "x plain")
    rows = [header]
    for length in args.lengths:
        for steps in args.steps:
            here = ways + ["eager"] * (length <= args.eager_up_to)
            rows += compare(length, steps, here, args)
    print_table(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens per sequence")
    parser.add_argument("--steps", type=int, nargs="+", default=[60], help="reasoning steps per sequence")
    parser.add_argument("--heads", type=int, default=0, help="number of key-focus heads; 0 leaves the row out")
    parser.add_argument("--rhythm", action="store_true", help="add the rhythm rows")
    parser.add_argument(
        "--eager-up-to", type=int, default=2048, help="longest sequence for eager maps, which are T x T"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(length: int, steps: int, ways: list[str], args: argparse.Namespace) -> list[tuple]:
    """Table rows of one length: times from one process, memory from one process per way."""
    task = {"length": length, "steps": steps, "heads": args.heads, "device": args.device}
    seconds = run_worker({**task, "ways": ways, "repeats": args.repeats})["seconds"]
    memory = {way: run_worker({**task, "ways": [way], "repeats": 1}) for way in ways}
    rows = []
    for way in ways:
        ratios = [mine / plain for mine, plain in zip(seconds[way], seconds["plain"], strict=True)]
        rows.append(
            (
                length,
                steps,
                WAYS[way],
                f"{statistics.median(seconds[way]) * 1e3:.0f} ms",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{memory[way]['peak']:.0f}",
                f"{memory[way]['peak'] / memory['plain']['peak']:.2f}",
                f"{memory[way]['own']:.0f}",
                f"{memory[way]['own'] / memory['plain']['own']:.2f}",
            )
        )
    return rows


def run_worker(task: dict) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(rows: list[tuple]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


if __name__ == "__main__":
    main()
