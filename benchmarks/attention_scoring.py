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
import time


WAYS = {
    "plain": "plain forward",
    "fci": "forward + FCI",
    "heads": "forward + key-focus scores",
    "rhythm": "forward + rhythm",
    "rhythm_alone": "forward for rhythm alone",
    "eager": "eager maps + einsum",
}
SHAPES = {
    "cpu": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 4096,
    },
    "cuda": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}
ANSWER_SHARE = 0.1  # of the sequence, for the key-focus scores


def main() -> None:
    args = parse_args()
    if args.worker:
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


def measure(task: dict) -> dict:
    """Run the ways of one task in turn; seconds per way and repeat, peak memory in MiB."""
    import torch

    device = task["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    model, run = prepare(task, device)
    with torch.no_grad():
        if len(task["ways"]) > 1:
            for way in task["ways"]:
                run(way)  # warm-up: first calls allocate and choose kernels
        idle = peak_memory(device, reset=True)
        seconds: dict[str, list[float]] = {way: [] for way in task["ways"]}
        for _ in range(task["repeats"]):
            for way in task["ways"]:
                start = now(device)
                run(way)
                seconds[way].append(now(device) - start)
    peak = peak_memory(device, reset=False)
    return {"seconds": seconds, "peak": peak, "own": peak - idle}


def prepare(task: dict, device: str):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    from attn_trainers.attention import (
        InfluenceObserver,
        KeyFocusObserver,
        RhythmObserver,
        forward_for_attention,
        middle_layers,
        observe_attention,
    )

    set_seed(0)
    length, num_steps = task["length"], task["steps"]
    config = Qwen2Config(**SHAPES[device], max_position_embeddings=length)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(dtype).eval()
    ids = torch.randint(0, config.vocab_size, (1, length), device=device)
    mask = torch.ones_like(ids)
    edges = torch.linspace(0, length, num_steps + 2).long().tolist()  # the prompt is range 0
    ranges = [list(zip(edges[:-1], edges[1:], strict=True))]
    layers = middle_layers(config.num_hidden_layers)
    heads = [(layers[i % len(layers)], i) for i in range(task["heads"])]
    answer = length - int(length * ANSWER_SHARE)
    thinking = [[(start, end) for start, end in ranges[0][1:] if end <= answer]]
    observers = {
        "fci": lambda: InfluenceObserver(mask, ranges),
        "heads": lambda: KeyFocusObserver(mask, thinking, [answer], heads),
        "rhythm": lambda: RhythmObserver(mask, [edges[1]], layers),
    }

    def forward():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def run(way: str) -> None:
        if way == "plain":
            forward()
        elif way == "rhythm_alone":
            forward_for_attention(model, ids, mask, observers["rhythm"]())
        elif way == "eager":
            eager_influence(model, ids, mask, ranges[0])
        else:
            observer = observers[way]()
            with observe_attention(model, observer):
                forward()
            observer.result()

    return model, run


def eager_influence(model, ids, mask, ranges: list[tuple[int, int]], delta: int = 4):
    """FCI from eager attention maps: what the fused way replaces."""
    import torch

    steps = torch.zeros(len(ranges), ids.shape[1], dtype=model.dtype, device=ids.device)  # (S, T)
    for step, (start, end) in enumerate(ranges):
        steps[step, start:end] = 1.0 / (end - start)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, output_attentions=True
    ).attentions
    model.set_attn_implementation(usual)
    later = torch.ones(len(ranges), len(ranges), device=ids.device).tril(-delta)  # [j, k]: j >= k + delta
    influence = torch.zeros(len(ranges), device=ids.device)
    for maps in output:  # (1, H, T, T)
        pooled = torch.einsum("jt,htu,ku->hjk", steps, maps[0], steps)
        influence = influence.maximum((pooled * later).sum(dim=1).amax(dim=0))
    return influence


def now(device: str) -> float:
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str, *, reset: bool) -> float:
    """Highest memory so far in MiB; with `reset`, the current one, from which the peak is counted anew."""
    import torch

    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        field = next(line for line in file if line.startswith("VmHWM"))
    return int(field.split()[1]) / 2**10


if __name__ == "__main__":
    main()
