"""vLLM colocate: weights that follow large updates, and memory that sleep mode gives back."""

import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from ..attnrl.config import AttnRLConfig
from ..attnrl.trainer import AttnRLTrainer
from ..sampling.models import load_tokenizer
from ..sampling.requests import GenerationRequest
from .measuring import device_used
from .models import model_folder, odd_sum, save_model, word_problems
from .registry import Context, Finding, Skipped, check


SHARE = 0.3  # of the GPU's memory, for vLLM


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")


def settings(context: Context, **more) -> dict[str, object]:
    """Settings of a trainer that samples by vLLM colocate, for checks that train nothing or little."""
    common = {
        "per_device_train_batch_size": 10,
        "steps_per_generation": 3,
        "gradient_accumulation_steps": 3,
        "max_completion_length": 32,
        "vllm_max_model_length": 256,
        "vllm_gpu_memory_utilization": SHARE,
        "use_vllm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "min_branch_spacing": 0,
        "beta": 0.0,
        "max_steps": 1,
        "bf16": context.device == "cuda",
        "use_cpu": context.device == "cpu",
        "model_init_kwargs": {"dtype": "float32"},
    }
    return common | more


def make_trainer(context: Context, folder: str, name: str, lora: bool = False, **more) -> AttnRLTrainer:
    require_vllm()
    return AttnRLTrainer(
        folder,
        odd_sum,
        AttnRLConfig(str(Path(context.folder) / "runs" / name), **settings(context, **more)),
        train_dataset=word_problems(64),
        processing_class=load_tokenizer(folder),
        peft_config=LoraConfig(r=8, lora_alpha=64, target_modules="all-linear") if lora else None,
    )


@torch.no_grad()
def difference(trainer: AttnRLTrainer, *, stale: bool) -> Tensor:
    """|log-prob of vLLM − of the trainer| of sampled tokens, (n,).

    Args:
        trainer: with vLLM colocate.
        stale: let the engine keep the weights that it has, or push the trainer's.
    """
    trainer._last_loaded_step = trainer.state.global_step if stale else -1
    prompt = [5, 9, 14, 33, 42]
    requests = [GenerationRequest(prompt, 30, seed) for seed in range(8)]
    found = []
    model = trainer.model.eval()
    for sample in trainer.generate_requests(requests):
        ids = torch.tensor([prompt + sample.token_ids], device=trainer.accelerator.device)
        with trainer.accelerator.autocast():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logps = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append((logps.cpu() - torch.tensor(sample.logps)).abs())
    return torch.cat(found)


@torch.no_grad()
def update_much(trainer: AttnRLTrainer) -> None:
    """A large update of everything that is trained, of the size of the weights themselves."""
    generator = torch.Generator(trainer.accelerator.device).manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.add_(noise * max(0.5 * parameter.std(correction=0).item(), 0.02))


def check_sync(context: Context, name: str, *, lora: bool = False, **shape) -> list[Finding]:
    """Log-probs of engine and trainer before and after a large update, and those of an engine that missed it."""
    require_vllm()
    folder = save_model(context.folder / "models" / name, context, layers=4, **shape)
    trainer = make_trainer(context, folder, name, lora)
    before = difference(trainer, stale=False).mean().item()
    update_much(trainer)
    missed = difference(trainer, stale=True).mean().item()
    after = difference(trainer, stale=False).mean().item()
    return [
        Finding("mean difference of log-probs before", before, most=0.05),
        Finding("the same after a large update", after, most=3 * before + 1e-3),
        Finding("that of an engine that missed it / after", missed / max(after, 1e-9), least=5),
    ]


@check("sync_full_untied", 110)
def sync_full_untied(context: Context) -> list[Finding]:
    """Weight sync of a full model with an output head of its own."""
    return check_sync(context, "untied")


@check("sync_full_tied", 110, in_smoke=False)
def sync_full_tied(context: Context) -> list[Finding]:
    """Weight sync of a full model with a tied output head."""
    return check_sync(context, "tied", tied=True)


@check("sync_lora_untied", 110, in_smoke=False)
def sync_lora_untied(context: Context) -> list[Finding]:
    """Weight sync of a LoRA."""
    return check_sync(context, "untied", lora=True)


@check("sync_lora_tied", 110)
def sync_lora_tied(context: Context) -> list[Finding]:
    """Weight sync of a LoRA on a model with a tied output head."""
    return check_sync(context, "tied", lora=True, tied=True)


@check("sync_moe", 110)
def sync_moe(context: Context) -> list[Finding]:
    """Weight sync of a mixture of experts."""
    return check_sync(context, "moe", moe=True)


@check("sleep_and_wake", 150, needs_cuda="vLLM's sleep mode maps and unmaps GPU memory")
def sleep_and_wake(context: Context) -> list[Finding]:
    """Memory that sleep mode gives back, and log-probs after waking."""
    trainer = make_trainer(context, model_folder(context), "sleep", vllm_enable_sleep_mode=True)
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    asleep = device_used()  # TRL's engine sleeps from the start
    before = difference(trainer, stale=False).mean().item()
    asleep_again = device_used()
    trainer._sync_vllm_if_stale()
    trainer.vllm_generation.llm.wake_up(tags=["kv_cache"])
    awake = device_used()
    trainer.vllm_generation.llm.sleep(level=2)
    trainer.vllm_generation._llm_weights_sleeping = True
    back = device_used()
    after = difference(trainer, stale=False).mean().item()
    return [
        Finding("GiB in use asleep", asleep),
        Finding("GiB in use awake", awake),
        Finding("given back / vLLM's share", (awake - back) / (SHARE * total), least=0.7),
        Finding("growth over a cycle, GiB", back - asleep_again, most=0.5),
        Finding("mean difference of log-probs after waking", after, most=2 * before + 1e-3),
    ]
