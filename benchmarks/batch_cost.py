r"""What a generation batch of AttnRL costs: tokens and the slowest rank, memory of the host.

    python benchmarks/batch_cost.py tokens [--prompts 50] [--ranks 8]
    python benchmarks/batch_cost.py memory [--prompts 175] [--tokens 5000]
    python benchmarks/batch_cost.py steady [--batches 500]

`tokens` arranges random batches of the published trees and tells their updates, the tokens that are forwarded over
those that differ, and how far the slowest rank of an update lies above the mean; no model is needed. `memory` builds
the rollouts of a batch of 24 leaves a prompt as a rank holds them, sends them through what ranks exchange, makes all
rows and tells the peak. `steady` trains a small model and compares the resident memory after the last generation batch
with that after the tenth.
"""

import argparse
import gc
import pickle
import random
import resource
import tempfile
from pathlib import Path

import numpy as np

from attn_trainers.attnrl.batches import arrange_updates, group_trees, rank_loads, unique_tokens
from attn_trainers.attnrl.exploration import BranchPoints
from attn_trainers.attnrl.pipeline import Draw
from attn_trainers.attnrl.rollouts import BranchedRollout, Continuation, PromptRollouts, ReadRollout
from attn_trainers.attnrl.rows import prompt_rows
from attn_trainers.tables import markdown_table


MIB = 2**20
PROMPT_TOKENS = 200
LONGEST = 8192


def sample_fields(rng: np.random.Generator, length: int, reward: float) -> dict:
    """Fields of a sample of random tokens."""
    return {
        "tokens": rng.integers(0, 150_000, length, dtype=np.int32),
        "sampling_logps": rng.random(length, dtype=np.float32),
        "policy": 0,
        "rewards": np.array([reward], dtype=np.float32),
        "reward": reward,
    }


def random_prompt(
    serial: int, rng: np.random.Generator, num_rollouts: int, num_expanded: int, mean: int
) -> PromptRollouts:
    """A prompt whose first rollouts are branched at two places into two continuations each."""

    def length(most: int) -> int:
        return int(min(most, 2 + rng.lognormal(np.log(mean) - 0.18, 0.6)))

    rollouts: list[ReadRollout] = []
    for index in range(num_rollouts):
        fields = sample_fields(rng, length(LONGEST), float(index % 2))
        size = len(fields["tokens"])
        known = {"old_logps": rng.random(size, dtype=np.float32), "step_ranges": []}
        if index >= num_expanded:
            rollouts.append(ReadRollout(**fields, **known))
            continue
        offsets = sorted(rng.integers(1, size, 2).tolist() * 2)
        branches = [
            Continuation(offset=o, **sample_fields(rng, length(LONGEST - o) if o < LONGEST - 2 else 1, float(i % 2)))
            for i, o in enumerate(offsets)
        ]
        rollouts.append(BranchedRollout(**fields, **known, branch_points=BranchPoints(offsets), branches=branches))
    return PromptRollouts(Draw(serial, serial), {}, [0] * PROMPT_TOKENS, rollouts)


def show_tokens(num_prompts: int, num_ranks: int) -> None:
    """Cost of batches that fill a share of the 1,920 rows of the published settings, 192 rows an update."""
    table = []
    for share in (0.1, 0.3, 0.6, 1.0):
        rng = np.random.default_rng(0)
        prompts = [random_prompt(i, rng, 6, random.Random(i).randint(3, 6), 3000) for i in range(num_prompts)]
        rows = [row for p in prompts for row in prompt_rows(p, train_unexpanded=False)]
        trees = group_trees(rows)
        rows = [row for tree in trees[: max(1, int(share * len(trees)))] for row in tree]
        different = sum(map(unique_tokens, group_trees(rows)))
        for budget in (None, 4 * 9216):
            updates = arrange_updates(
                rows, rows_per_update=192, num_ranks=num_ranks, rows_per_rank=4, max_tokens=budget, seed="0"
            )
            loads = [rank_loads(update) for update in updates]
            if budget is None:
                loads = [[sum(row.length for m in u for row in m[rank]) for rank in range(num_ranks)] for u in updates]
            total = sum(map(sum, loads))
            slowest = sum(max(of_update) * num_ranks for of_update in loads) / total
            name = "4 rows" if budget is None else f"{budget:,} tokens"
            table.append(
                [len(rows), name, len(updates), sum(map(len, updates)), f"{total / different:.2f}", f"{slowest:.3f}"]
            )
    header = ["rows", "micro-batch", "updates", "micro-batches", "tokens / different ones", "slowest rank / mean"]
    print(markdown_table(header, table))


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """Resident memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def show_memory(num_prompts: int, num_tokens: int) -> None:
    """Peak of a batch: 8 rollouts a prompt, 4 of them with 4 continuations."""
    start = resident()
    rng = np.random.default_rng(0)
    prompts = [random_prompt(i, rng, 8, 4, num_tokens) for i in range(num_prompts)]
    leaves = sum(len(p.leaves) for p in prompts)
    table = [[f"rollouts ({leaves:,} leaves)", f"{resident() - start:,.0f}", f"{peak() - start:,.0f}"]]
    prompts = pickle.loads(pickle.dumps(prompts))
    table.append(["exchanged between ranks", f"{resident() - start:,.0f}", f"{peak() - start:,.0f}"])
    rows = [row for p in prompts for row in prompt_rows(p, train_unexpanded=False)]
    table.append([f"and {len(rows):,} rows", f"{resident() - start:,.0f}", f"{peak() - start:,.0f}"])
    print(markdown_table(["stage", "MiB now", "MiB at most"], table))


def show_steady(num_batches: int) -> None:
    """Resident memory of a small run over its generation batches."""
    from attn_trainers import AttnRLConfig, AttnRLTrainer
    from attn_trainers.tiny.arithmetic import build_model, build_tokenizer, sample_problems
    from attn_trainers.tiny.runs import to_dataset

    measured: list[float] = []

    class Measuring(AttnRLTrainer):
        def _train_batch(self):
            updates = super()._train_batch()
            gc.collect()
            measured.append(resident())
            if len(measured) >= num_batches:
                self.control.should_training_stop = True
            return updates

    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        build_model(tokenizer, hidden_size=64, num_layers=2).save_pretrained(folder)
        args = AttnRLConfig(
            folder + "/out",
            per_device_train_batch_size=30,
            gradient_accumulation_steps=2,
            max_steps=10 * num_batches,
            max_completion_length=24,
            min_branch_spacing=0,
            influence_delta=1,
            beta=0.0,
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = Measuring(
            folder,
            lambda completions, completion_ids, **kwargs: [float(sum(ids) % 2) for ids in completion_ids],
            args,
            train_dataset=to_dataset(sample_problems(64, seed=0)),
            processing_class=tokenizer,
        )
        trainer.train()
    print(f"{len(measured)} generation batches, {trainer.state.global_step} updates")
    steps = sorted({index for index in (9, num_batches // 2, num_batches - 1) if index < len(measured)})
    rows = [[i + 1, f"{measured[i]:,.1f}", f"{measured[i] / measured[min(9, steps[-1])] - 1:+.2%}"] for i in steps]
    print(markdown_table(["generation batch", "MiB resident", "over the tenth"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "memory", "steady"])
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--batches", type=int, default=500)
    args = parser.parse_args()
    if args.what == "tokens":
        show_tokens(args.prompts or 50, args.ranks)
    elif args.what == "memory":
        show_memory(args.prompts or 175, args.tokens)
    else:
        show_steady(args.batches)


if __name__ == "__main__":
    main()
