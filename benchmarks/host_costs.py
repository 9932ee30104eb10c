"""What a host does beside the GPUs of an AttnRL step: unit costs, and how they are measured here.

For `scale_model.py`, which puts them together.
"""

import json
import pickle
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from batch_cost import PROMPT_TOKENS

from attn_trainers.attnrl.batches import arrange_updates
from attn_trainers.attnrl.rollouts import PromptRollouts
from attn_trainers.attnrl.rows import prompt_rows


@dataclass(frozen=True)
class HostCosts:
    """By `scale_model.py --measure`; the defaults are for a look without measuring."""

    grading: float = 1e-3  # seconds per completion and worker process, warm
    workers: int = 8  # grading processes per rank
    pickling: float = 1e-9  # seconds per byte of rollouts that are exchanged, both directions
    arranging: float = 1e-5  # seconds per row: trees, rows, updates; every rank does it for all rows
    segmenting: float = 1e-6  # seconds per token that is cut into steps
    disk: float = 1e-9  # seconds per byte written and read again
    influence: float = 1.12  # a forward that reads influence over a plain one: the goal of gpu-check


def measure_host(prompts: list[PromptRollouts], data: Path | None) -> HostCosts:
    """Unit costs of this machine, each the shortest of three.

    Args:
        prompts: those of a generation batch.
        data: file of graded completions, for the cost of grading.
    """

    def shortest(work) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    payload = pickle.dumps(prompts)
    pickling = shortest(lambda: pickle.loads(pickle.dumps(prompts))) / len(payload)

    def arrange() -> int:
        rows = [row for p in prompts for row in prompt_rows(p, train_unexpanded=False)]
        arrange_updates(rows, rows_per_update=192, num_ranks=8, rows_per_rank=4, max_tokens=4 * 9216, seed="0")
        return len(rows)

    arranging = shortest(arrange) / arrange()
    measured = {"pickling": pickling, "arranging": arranging, "segmenting": measure_segmenting()}
    with tempfile.NamedTemporaryFile() as file:
        block = np.random.default_rng(0).bytes(2**28)

        def write_and_read():
            Path(file.name).write_bytes(block)
            Path(file.name).read_bytes()

        start = time.perf_counter()
        write_and_read()
        measured["disk"] = (time.perf_counter() - start) / len(block)
    if data is not None:
        measured["grading"] = measure_grading(data)
    return replace(HostCosts(), **measured)


def measure_segmenting() -> float:
    """Seconds per token of cutting completions into steps."""
    from attn_trainers.attnrl.steps import StepDelimiters, segment_steps
    from attn_trainers.tiny.byte_model import build_byte_tokenizer

    delimiters = StepDelimiters.from_tokenizer(build_byte_tokenizer())
    tokens = np.random.default_rng(0).integers(0, 256, 8192).tolist()
    start = time.process_time()
    for _ in range(20):
        segment_steps(PROMPT_TOKENS, tokens, delimiters)
    return (time.process_time() - start) / 20 / len(tokens)


def measure_grading(data: Path) -> float:
    """Seconds of one worker per completion, of recorded completions, once the workers run."""
    from attn_trainers.rewards import math as rewards
    from attn_trainers.rewards.pool import shared_pool

    lines = [json.loads(line) for line in data.read_text().splitlines()]
    completions, answers = [line["completion"] for line in lines], [line["answer"] for line in lines]
    ends = rewards.ends_of_thinking(None, len(lines))
    seconds = []
    for _ in range(2):  # the first starts the workers
        start = time.perf_counter()
        rewards._grade(completions, answers, ends, rewards.TIMEOUT_SECONDS)
        seconds.append(time.perf_counter() - start)
    workers = shared_pool().size
    shared_pool().close()
    return seconds[1] * workers / len(lines)
