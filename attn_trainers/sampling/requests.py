"""One sample to draw and what came of it: the types that trainers, evaluation and head discovery share.

They know no backend: `attn_trainers.sampling.vllm` and `attn_trainers.sampling.transformers` draw the samples.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace


Progress = Callable[[Iterable, str, int], Iterable]
"""Gives items back, and shows how far they are gone through: called with them, what is done, and their number."""


def without_progress(items: Iterable, what: str, total: int) -> Iterable:
    """The items, and nothing shown."""
    return items


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to draw.

    Attributes:
        prompt_ids: tokens to continue: a prompt, or a prompt with the head of a completion.
        max_tokens: tokens to sample at most, at least 1.
        seed: makes this sample repeatable whatever else is in the batch, up to how a backend's floats depend on the
            other rows; `None` leaves it to the backend.
    """

    prompt_ids: list[int]
    max_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class GeneratedTokens:
    """What was sampled for one request.

    Attributes:
        token_ids: sampled tokens, EOS included where it was sampled.
        logps: the sampler's log-probability of each sampled token, NaN where it had none; `None` if the backend
            reports none (transformers), or was not asked for them (evaluation).
        weight_version: name of the weights that a server sampled it with; `None` for an engine of one's own.
    """

    token_ids: list[int]
    logps: list[float] | None = None
    weight_version: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SamplingSettings:
    """How the completions of a model that is not in training are drawn.

    Attributes:
        temperature: 0 decodes greedily.
        top_p: share of the probability that the kept tokens hold.
        seed: of a vLLM engine; each request has its own beside it.
        dtype: "float32", "bfloat16", "float16" or "auto": as saved, but float32 on a CPU that has no instructions for
            it, and bfloat16 for float32 weights with vLLM on a GPU.
        batch_size: completions per batch (transformers only).
        gpu_memory_utilization: share of GPU memory that vLLM takes.
        tensor_parallel_size: GPUs that vLLM spreads the model over.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    batch_size: int = 16
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1


def fit_positions(requests: Sequence[GenerationRequest], positions: int | None) -> tuple[list[GenerationRequest], int]:
    """Requests whose `max_tokens` are cut to what the model's positions leave after the prompt, and how many were cut.

    Beyond its positions a model writes noise (transformers), or the engine refuses the run (vLLM).

    Args:
        requests: the requests.
        positions: tokens that the model was made for, prompt and completion together; `None` sets no limit.

    Raises:
        ValueError: if a prompt leaves no position for a token.
    """
    if positions is None:
        return list(requests), 0
    fitting = []
    for request in requests:
        room = positions - len(request.prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens fills the {positions} positions of the model; leave "
                "its problem out, or shorten prompt_template."
            )
        fitting.append(replace(request, max_tokens=room) if request.max_tokens > room else request)
    return fitting, sum(one.max_tokens > positions - len(one.prompt_ids) for one in requests)


def cut_completion(token_ids: Sequence[int], max_tokens: int, eos_token_ids: Sequence[int]) -> list[int]:
    """Tokens up to the limit and up to the first EOS, which is kept."""
    tokens = list(token_ids[:max_tokens])
    for position, token in enumerate(tokens):
        if token in eos_token_ids:
            return tokens[: position + 1]
    return tokens


def count_missing_logps(completions: Sequence[GeneratedTokens]) -> int:
    """Tokens for which the sampler gave no usable log-probability (NaN)."""
    return sum(math.isnan(logp) for completion in completions for logp in completion.logps or ())
