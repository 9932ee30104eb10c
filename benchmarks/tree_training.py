"""What a training step of a published tree costs, its rows forwarded one by one and packed.

    python benchmarks/tree_training.py                                    # CPU: 6 layers of 256, L = 512 and 2048
    python benchmarks/tree_training.py --lengths 512 --key-heads 4        # without grouped heads
    python benchmarks/tree_training.py --model-shape 1p5b --lengths 8192 --trees 6 --device cuda

A tree is one rollout of L tokens after its prompt and two continuations from each of two branch points, at shares of
L: 1 + 2 x 2 rows. One measurement is forward and backward of the log-probs of all rows, one tree after the other. Ways
take turns in one process, and the shortest of the repeats counts, so that other load falls on both alike; on a CPU the
time is the process's CPU time. Peak memory: a fresh process per way, what its highest resident set (CPU) or allocation
(CUDA) has above the loaded model. Rows are one batch with the model's own attention; both ways keep the logits of
completion tokens alone and share the code that normalises them. Weights are random; float32 on a CPU, bfloat16 on
CUDA.

Prints a table with the speed-up, the ratio of row tokens to unique tokens (what packing
saves in all but attention) and their quotient, of which 0.9 is wanted; and draws it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from attn_trainers.gpu_check.shapes import SHAPES


BRANCH_POINTS = ((0.1, 0.3), (0.2, 0.4), (0.4, 0.6))  # shares of the length
WAYS = ("rows", "packed")


def main() -> None:
    args = parse_args()
    if args.worker:
        from attn_trainers.gpu_check.tree_cost import measure

        print(json.dumps(measure(json.loads(args.worker))))
        return
    from attn_trainers.tables import markdown_table

    results = []
    for length in args.lengths:
        for points in BRANCH_POINTS:
            results.append(compare(length, points, args))
            print(*table_row(results[-1]), file=sys.stderr, flush=True)
    header = ("L", "branch points", "rows s", "packed s", "speed-up", "tokens", "quotient", "rows MiB", "packed MiB")
    print(markdown_table(header, [table_row(result) for result in results]))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results, args.picture)
    print(f"Drawn in {args.picture}.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the rollout")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--trees", type=int, default=1, help="trees of the prompt, one micro-batch each")
    parser.add_argument("--model-shape", choices=list(SHAPES), default="small")
    parser.add_argument("--key-heads", type=int, default=None, help="key heads, in place of the shape's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is one")
    parser.add_argument("--picture", type=Path, default=Path("runs/tree_training.png"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(length: int, points: tuple[float, float], args: argparse.Namespace) -> dict:
    """Seconds of both ways from one process, memory from one process each."""
    import torch

    shape = SHAPES[args.model_shape]
    if args.key_heads:
        shape = {**shape, "num_key_value_heads": args.key_heads}
    task = {
        "length": length,
        "points": points,
        "prompt": args.prompt,
        "trees": args.trees,
        "shape": shape,
        "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    timed = run_worker({**task, "ways": WAYS, "repeats": args.repeats})
    memory = {way: run_worker({**task, "ways": [way], "repeats": 1})["memory"] for way in WAYS}
    return {"length": length, "points": points, "seconds": timed["seconds"], "ratio": timed["ratio"], "memory": memory}


def table_row(result: dict) -> tuple:
    seconds, memory = result["seconds"], result["memory"]
    speed_up = seconds["rows"] / seconds["packed"]
    return (
        result["length"],
        "{} and {}".format(*result["points"]),
        f"{seconds['rows']:.2f}",
        f"{seconds['packed']:.2f}",
        f"{speed_up:.2f}",
        f"{result['ratio']:.2f}",
        f"{speed_up / result['ratio']:.2f}",
        f"{memory['rows']:.0f}",
        f"{memory['packed']:.0f}",
    )


def draw(results: list[dict], path: Path) -> None:
    """Speed-up of every tree beside its ratio of tokens."""
    from attn_trainers.plots import BLUE, COLOURS, INK, plt

    figure, axis = plt.subplots(figsize=(1.5 + 1.1 * len(results), 3.2))
    places = range(len(results))
    speed_ups = [result["seconds"]["rows"] / result["seconds"]["packed"] for result in results]
    axis.bar([place - 0.2 for place in places], speed_ups, 0.4, color=BLUE, label="speed-up")
    ratios = [result["ratio"] for result in results]
    axis.bar([place + 0.2 for place in places], ratios, 0.4, color=COLOURS[1], label="row tokens / unique tokens")
    labels = ["L = {}\n{}, {}".format(result["length"], *result["points"]) for result in results]
    axis.set_xticks(list(places), labels, fontsize=8)
    axis.axhline(1, color=INK, linewidth=0.8)
    axis.set_title("Forward and backward of a tree: packed against rows", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_worker(task: dict) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
