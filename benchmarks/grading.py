r"""How fast completions are graded, and how much of it needs a worker.

    python benchmarks/grading.py --data graded_rollouts.jsonl [--num_completions 1000]

The file holds `completion` and `answer` per line; its lines are repeated up to `num_completions`. In training, equal
requests are graded once and plain answers without a worker; "all by math-verify" sends every completion to a worker.
"Cold" includes the start of the workers.
"""

import argparse
import json
import time
from pathlib import Path

from attn_trainers.rewards import math as rewards
from attn_trainers.rewards.answers import answered
from attn_trainers.rewards.pool import TIMEOUT, shared_pool


def measure(name: str, grade, count: int):
    start = time.perf_counter()
    outcomes = grade()
    seconds = time.perf_counter() - start
    print(f"{name:<22} {seconds:>9.2f} {count / seconds:>12,.0f} {outcomes.count(TIMEOUT):>9}")


def request(completion: str, answer: str) -> dict:
    """What a worker is asked where nothing is settled before."""
    return {"pairs": [[answer, text] for text in answered(completion)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num_completions", type=int, default=1000)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    rows = [rows[index % len(rows)] for index in range(args.num_completions)]
    completions, answers = [row["completion"] for row in rows], [row["answer"] for row in rows]
    ends = rewards.ends_of_thinking(None, len(completions))
    settled = sum(isinstance(rewards._prepare(*one), bool) for one in zip(completions, answers, ends, strict=True))
    unsettled = [request(*pair) for pair in zip(completions, answers, strict=True)]

    def as_in_training():
        return rewards._grade(completions, answers, ends, rewards.TIMEOUT_SECONDS)

    print(f"{len(rows)} completions, {shared_pool().size} workers at most")
    print(f"settled without math-verify: {settled / len(rows):.1%}\n")
    print(f"{'':<22} {'seconds':>9} {'items/s':>12} {'timeouts':>9}")
    measure("as in training, cold", as_in_training, len(rows))
    measure("as in training, warm", as_in_training, len(rows))
    shared_pool().close()
    for temperature in ("cold", "warm"):
        measure(
            f"all by math-verify, {temperature}",
            lambda: shared_pool().grade(unsettled, rewards.TIMEOUT_SECONDS),
            len(rows),
        )


if __name__ == "__main__":
    main()
