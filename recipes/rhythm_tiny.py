"""All credit schemes, their controls and the rhythm reward on a CPU: multi-step arithmetic, several seeds each.

    python recipes/rhythm_tiny.py

A noisy teacher warm-starts a small Qwen2 (cached in `--cache_dir`); every arm trains it with the same problems in the
same order and is evaluated on held-out problems. Runs follow one another in one process and sample with transformers,
since a process has one vLLM engine (`--use_vllm true` goes with one arm and one seed). Each finished run is a line in
`results.jsonl`; what is there is not run again, so that the comparison can be cut off (`--max_minutes`) and gone on
with. `results.md` and `results.png` hold the table and the picture. At its end a launch leaves the model of its best
run there too, with a card, if that run beats all earlier ones, and pushes it with `--push_to_hub`.

    python recipes/rhythm_tiny.py --arms none random coupled --seeds 0 1 2 3 4 --learning_rate 1e-4
"""

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from transformers import PrinterCallback

from attn_trainers import RhythmConfig, RhythmTrainer
from attn_trainers.base.card import CardNotes, public_command, publish
from attn_trainers.launch.recipe import HAS_CUDA
from attn_trainers.launch.tasks import parse_task
from attn_trainers.tables import markdown_table
from attn_trainers.tiny.runs import (
    HeldOutCurve,
    TinyArguments,
    exact_answer_reward,
    prepare,
    task_of,
    to_dataset,
)


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


logger = logging.getLogger(__name__)

ARMS = {
    "none": {"scheme": "none"},
    "random": {"scheme": "random"},
    "entropy": {"scheme": "entropy"},
    "local": {"scheme": "local"},
    "global": {"scheme": "global"},
    "coupled": {"scheme": "coupled"},
    "coupled_v1": {"preset": "paper_v1"},
    "entropy_bottom": {"scheme": "entropy_bottom"},
    "local_bottom": {"scheme": "local_bottom"},
    "global_bottom": {"scheme": "global_bottom"},
    "coupled_bottom": {"scheme": "coupled_bottom"},
    "reward_split": {"preset": "rhythm_reward"},
    "reward_total": {"preset": "rhythm_reward", "reward_mode": "total"},
    "reward_token": {"preset": "rhythm_reward", "reward_mode": "token"},
    "coupled+reward": {"scheme": "coupled", "rhythm_lambda": 0.1},
}


@dataclass
class Comparison(TinyArguments):
    """What is compared."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Any of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of each arm."})
    num_eval_problems: int = field(default=400, metadata={"help": "Held-out problems."})
    max_minutes: float = field(default=0.0, metadata={"help": "Start no run after so many minutes; 0: no limit."})

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"arms={unknown} are unknown; choose from {', '.join(ARMS)}.")


@dataclass
class Recipe(RhythmConfig):
    """Settings of every run; an arm sets the scheme or the reward on top of them."""

    output_dir: str | None = "runs/rhythm_tiny"
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    per_device_train_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = 1
    num_generations: int | None = 8
    max_steps: int = 40
    max_completion_length: int | None = 48
    vllm_max_model_length: int | None = 128
    loss_type: str = "grpo"
    gradient_checkpointing: bool = False
    bf16: bool | None = HAS_CUDA
    use_cpu: bool = not HAS_CUDA
    logging_steps: float = 1
    disable_tqdm: bool | None = True
    save_strategy: str = "no"
    report_to: None | str | list[str] = "none"


DEPENDENCIES = {  # solutions of 21 steps of 10 tokens
    "output_dir": "runs/rhythm_dependencies",
    "per_device_train_batch_size": 64,
    "max_steps": 60,
    "max_completion_length": 352,
    "vllm_max_model_length": 512,
    "temperature": 0.7,
    "cache_implementation": None if HAS_CUDA else "static",  # see `attnrl_tiny.py`
    "num_eval_problems": 100,
    "num_eval_samples": 2,
}


def run(arm: str, seed: int, script: Comparison, args: Recipe, task: tuple) -> tuple[dict, RhythmTrainer]:
    """Train and evaluate one arm with one seed: the run's line and its trainer."""
    folder, tokenizer, training, held_out = task
    start = time.perf_counter()
    # Fields that an arm's preset decides are free again; sizes that were derived from others are kept.
    free = {"scheme": None, "rhythm_lambda": None, "gamma_sign": None, "fai_max_distance": None}
    derived = {"generation_batch_size": None, "seed": seed, "data_seed": seed}
    args = replace(args, **free | derived | ARMS[arm])
    trainer = RhythmTrainer(
        str(folder), exact_answer_reward, args, train_dataset=to_dataset(training), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    curve = HeldOutCurve(trainer, script, held_out, Path(args.output_dir) / f"curve_{arm}_{seed}.jsonl")
    before = curve.measure()
    trainer.train()
    seconds = time.perf_counter() - start - curve.evaluation_seconds
    result = curve.measure()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    record = {
        "arm": arm,
        "seed": seed,
        "before": before.accuracy,
        "accuracy": result.accuracy,
        "mean_length": result.mean_length,
        "entropy": history[-1]["entropy"],
        "rewards": [entry["reward"] for entry in history],
        "attention_share": float(np.mean([entry.get("rhythm/seconds/attention_share", 0.0) for entry in history])),
        "seconds": seconds,
        "settings": {name: getattr(args, name) for name in ("learning_rate", "max_steps", "num_generations")},
    }
    return record, trainer


def mean_and_error(values: list[float]) -> str:
    """Mean and its standard error over seeds, in points of accuracy; one seed has no error."""
    error = f" ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{error}"


def difference(records: dict, arm: str, other: str) -> str:
    """Mean paired difference to another arm over the seeds that both have."""
    seeds = sorted(records.get(arm, {}).keys() & records.get(other, {}).keys())
    if arm == other or not seeds:
        return ""
    return mean_and_error([records[arm][s]["accuracy"] - records[other][s]["accuracy"] for s in seeds])


def report(folder: Path, script: Comparison) -> str:
    """Write `results.md` and `results.png` from the lines of `results.jsonl`, and return the table."""
    records: dict[str, dict[int, dict]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["arm"], {})[record["seed"]] = record
    before = np.mean([r["before"] for runs in records.values() for r in runs.values()])
    header = ["arm", "seeds", "held-out accuracy, %", "minus none", "minus random", "entropy", "attention, % of time"]
    rows = []
    for arm in [arm for arm in ARMS if arm in records]:
        runs = list(records[arm].values())
        accuracy = mean_and_error([r["accuracy"] for r in runs])
        others = [difference(records, arm, other) for other in ("none", "random")]
        entropy = f"{np.mean([r['entropy'] for r in runs]):.3f}"
        share = f"{100 * np.mean([r['attention_share'] for r in runs]):.1f}"
        rows.append([arm, len(runs), accuracy, *others, entropy, share])
    title = (
        f"{script.num_eval_problems} held-out problems x {script.num_eval_samples} samples; before training "
        f"{100 * before:.1f} %. Mean ± standard error over seeds; differences are paired by seed."
    )
    table = markdown_table(header, rows)
    (folder / "results.md").write_text(f"{title}\n\n{table}\n")
    print(f"{title}\n{table}")
    plot(records, before, folder / "results.png")
    return table


def plot(records: dict[str, dict[int, dict]], before: float, path: Path) -> None:
    """Accuracy of every run by arm, and the training reward over the steps."""
    arms = [arm for arm in ARMS if arm in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.34 * len(arms) + 2.2))
    for y, arm in enumerate(arms):
        values = [100 * r["accuracy"] for r in records[arm].values()]
        left.plot(values, [y] * len(values), "o", color="#2f6db3", alpha=0.5, markersize=4)
        left.plot(np.mean(values), y, "|", color="#2b2b2b", markersize=14, markeredgewidth=2)
    left.axvline(100 * before, color="grey", linestyle=":", linewidth=1)
    left.set_yticks(range(len(arms)), arms, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("held-out accuracy, % (dots: seeds, bar: mean, dotted: before)", fontsize=8)
    shown = [arm for arm in ("none", "random", "entropy", "local", "global", "coupled", "reward_split") if arm in arms]
    for arm in shown:
        curves = np.array([r["rewards"] for r in records[arm].values()]).mean(axis=0)
        smooth = np.convolve(curves, np.ones(5) / 5, mode="valid") if len(curves) >= 5 else curves
        right.plot(np.arange(len(smooth)) + len(curves) - len(smooth) + 1, smooth, label=arm, linewidth=1.3)
    right.set_xlabel("update", fontsize=8)
    right.set_title("training reward (mean of seeds, moving mean of 5)", fontsize=9)
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(script: Comparison, args: Recipe) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.use_vllm and len(script.arms) * len(script.seeds) > 1:
        raise ValueError(
            f"use_vllm=True cannot serve {len(script.arms)} arms x {len(script.seeds)} seeds, which are runs of one "
            "process, as it has one vLLM engine; name one arm and one seed, or set it False."
        )
    start = time.monotonic()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "results.jsonl"
    lines.touch()
    earlier = [json.loads(line) for line in lines.read_text().splitlines()]
    done = {(r["arm"], r["seed"]) for r in earlier}
    best, chosen = max((r["accuracy"] for r in earlier), default=-1.0), None
    task = prepare(script)
    # All arms of a seed first: a comparison that is cut off still compares.
    for arm, seed in [(arm, seed) for seed in script.seeds for arm in script.arms if (arm, seed) not in done]:
        if script.max_minutes and time.monotonic() - start > 60 * script.max_minutes:
            logger.info("Time is up; launch again to go on.")
            break
        record, trainer = run(arm, seed, script, args, task)
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logger.info("%s, seed %d: %.1f %% in %.0f s", arm, seed, 100 * record["accuracy"], record["seconds"])
        if record["accuracy"] > best:
            best, chosen = record["accuracy"], trainer
    table = report(folder, script)
    if chosen is not None:
        publish(chosen, CardNotes(task_of(script).title, table, public_command()))


if __name__ == "__main__":
    main(*parse_task((Comparison, Recipe), DEPENDENCIES))
