"""A few steps of each trainer with vLLM colocate: that they run, their time against GRPO's, their memory."""

import time
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from ..attnpo.config import AttnPOConfig
from ..attnpo.trainer import AttnPOTrainer
from ..attnrl.config import AttnRLConfig
from ..attnrl.trainer import AttnRLTrainer
from ..launch.memory import GIB, ModelShape, Sharding, TrainingSetup, estimate_memory
from ..rhythm.config import RhythmConfig
from ..rhythm.trainer import RhythmTrainer
from ..sampling.models import load_tokenizer
from .engine import require_vllm, settings
from .measuring import device_used
from .models import model_folder, odd_sum, word_problems
from .registry import Context, Finding, Skipped, check, on_gpu


STEPS = 3  # of which the first warms up
LEAST_MEMORY = 60  # GiB of a card that trains all weights in float32 beside vLLM
ROWS = 30  # per generation batch: AttnRL's leaf budget of a prompt
METHOD = {
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 10}),
    "attnpo": (
        AttnPOTrainer,
        AttnPOConfig,
        {"num_generations": 10, "heads": [[2, 0], [2, 1], [3, 2]], "answer": "last_boxed", "schedule_fraction": 0.0},
    ),
    "rhythm": (RhythmTrainer, RhythmConfig, {"num_generations": 10}),
    "attnrl": (AttnRLTrainer, AttnRLConfig, {}),
}


def completion_length(context: Context) -> int:
    return 32 if context.smoke else 1024


def train(context: Context, method: str) -> tuple[object, float]:
    """The trainer after its steps, and GiB that vLLM's allocations in torch took."""
    if not context.smoke:
        require_vllm()
    if not context.smoke and torch.cuda.get_device_properties(0).total_memory < LEAST_MEMORY * GIB:
        raise Skipped(f"full fine-tuning of a 1.5B model beside vLLM needs {LEAST_MEMORY} GiB")
    trainer_class, config_class, more = METHOD[method]
    length = completion_length(context)
    more = more | {"max_steps": STEPS, "max_completion_length": length, "vllm_max_model_length": 64 + length}
    more |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2, "use_vllm": not context.smoke}
    more |= {"steps_per_generation": ROWS // 2, "learning_rate": 1e-6}
    if context.smoke:
        more |= {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 3, "steps_per_generation": 3}
    options = settings(context, **more)
    if method != "attnrl":
        options.pop("min_branch_spacing")
    folder = model_folder(context)
    trainer = trainer_class(
        folder,
        odd_sum,
        config_class(str(Path(context.folder) / "runs" / method), **options),
        train_dataset=word_problems(128),
        processing_class=load_tokenizer(folder),
    )
    engine = 0.0
    if context.device == "cuda":
        model = sum(parameter.nbytes for parameter in trainer.model.parameters())
        engine = (torch.cuda.memory_allocated() - model) / GIB
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return trainer, engine


def check_step(context: Context, method: str) -> list[Finding]:
    """Steps that end in finite losses, their seconds, and the rows that they trained on."""
    start = time.perf_counter()
    trainer, _ = train(context, method)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    seconds = [entry["step_time"] for entry in history if "step_time" in entry]
    moved = [entry["grad_norm"] for entry in history]
    findings = [
        Finding("updates with a finite loss", sum(map(_is_finite, losses)), least=STEPS),
        Finding("largest norm of a gradient", max(moved), least=1e-9),
        Finding("seconds per update after the first", sum(seconds[1:]) / max(1, len(seconds) - 1)),
        Finding("rows per update", _rows(history)),
        Finding("seconds in all", time.perf_counter() - start),
    ]
    differences = [e["sampling/sampling_logp_difference/mean"] for e in history if _has_difference(e)]
    if differences:
        findings.append(Finding("sampler against trainer, mean |difference|", max(differences), most=0.05))
    return findings


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _has_difference(entry: dict) -> bool:
    return entry.get("sampling/sampling_logp_difference/mean") is not None


def _rows(history: list[dict]) -> float:
    rows = [entry.get("attnrl/rows_trained", ROWS) for entry in history[1:]]
    return sum(rows) / max(1, len(rows))


@check("step_grpo", 130)
def step_grpo(context: Context) -> list[Finding]:
    """Steps of TRL's GRPO, the measure of the others."""
    return check_step(context, "grpo")


@check("step_attnpo", 130)
def step_attnpo(context: Context) -> list[Finding]:
    """Steps of AttnPO."""
    return check_step(context, "attnpo")


@check("step_rhythm", 130)
def step_rhythm(context: Context) -> list[Finding]:
    """Steps of Rhythm."""
    return check_step(context, "rhythm")


@check("step_attnrl", 150)
def step_attnrl(context: Context) -> list[Finding]:
    """Steps of AttnRL."""
    return check_step(context, "attnrl")


@check("step_time", 10)
def step_time(context: Context) -> list[Finding]:
    """Time per row and update against GRPO, of the steps above."""
    name = "seconds per update after the first"
    if "step_grpo" not in context.steps:
        raise Skipped("it compares with step_grpo, which was not run or failed")
    base = context.steps["step_grpo"][name] / context.steps["step_grpo"]["rows per update"]
    findings = []
    for method, most in {"attnpo": 1.2, "rhythm": 1.3, "attnrl": None}.items():
        step = context.steps.get(f"step_{method}")
        if step and step["rows per update"]:
            ratio = step[name] / step["rows per update"] / base
            findings.append(on_gpu(context, f"{method}: time per row / GRPO's", ratio, most))
    return findings


@check("memory_estimate", 150, needs_cuda="a CPU has no allocator that keeps a peak")
def memory_estimate(context: Context) -> list[Finding]:
    """The preflight's estimate against the allocator's peak in a run of GRPO."""
    trainer, engine = train(context, "grpo")
    peak = torch.cuda.max_memory_allocated() / GIB - engine
    setup = TrainingSetup(
        Sharding(), micro_batch=2, row_tokens=64 + completion_length(context), weight_bytes=4, compute_bytes=2
    )
    estimate = estimate_memory(ModelShape.from_config(trainer.model.config), setup, 0).peak / GIB
    return [
        Finding("allocator's peak without vLLM, GiB", peak),
        Finding("estimate, GiB", estimate),
        on_gpu(context, "peak / estimate", peak / estimate, 1.05, 0.7),
        Finding("GiB in use on the device at the end", device_used()),
    ]
