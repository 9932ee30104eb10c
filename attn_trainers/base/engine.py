"""TRL's colocated vLLM engine, built with what TRL passes no setting for: its dtype, and room for an adapter."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from trl import GRPOConfig
from trl.generation import vllm_generation as trl_vllm

from ..sampling.models import cpu_dtype
from .adapter_sync import adapter_engine


def trained_dtype(model: nn.Module, args: GRPOConfig) -> torch.dtype:
    """What the trainer's forwards compute in: the mixed precision, else the weights' own dtype."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def engine_dtype(model: nn.Module, args: GRPOConfig, device: torch.device) -> str:
    """The dtype of a colocated engine, as vLLM names it.

    On a GPU "auto" stays vLLM's choice. On a CPU too that is bfloat16 for float32 weights, which samples from another
    policy than the trained one, and several times more slowly where the CPU has no instructions for it; there it is
    what the trainer computes in.
    """
    if args.vllm_dtype != "auto" or device.type != "cpu":
        return args.vllm_dtype
    return str(cpu_dtype(trained_dtype(model, args))).removeprefix("torch.")


@contextmanager
def engine_settings(trainer) -> Iterator[None]:
    """Context of a trainer's construction in which TRL's engine is built with our settings.

    TRL passes no such settings on, so the name by which it calls vLLM stands for a function meanwhile.

    Raises:
        ValueError: if `lora_sync` is "adapter" and the adapter cannot travel.
    """
    plain = getattr(trl_vllm, "LLM", None)
    if plain is None:  # vLLM is not installed
        yield
        return

    def build(**options):
        dtype = engine_dtype(trainer.model, trainer.args, trainer.accelerator.device)
        return adapter_engine(trainer, plain, options | {"dtype": dtype})

    trl_vllm.LLM = build
    try:
        yield
    finally:
        trl_vllm.LLM = plain
