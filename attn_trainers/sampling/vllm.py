"""What trainers and evaluation need of a vLLM engine. vLLM itself is imported where it is first used."""

import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .models import computed_dtype, end_token_ids, merged_model
from .requests import GeneratedTokens, GenerationRequest, SamplingSettings


def limit_cpu_cache() -> None:
    """Keep the KV cache of an engine on a CPU at 1 GiB where the user set nothing: vLLM would take half the memory."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def sampling_params(settings: Mapping[str, object], request: GenerationRequest):
    """vLLM's `SamplingParams` of one request: the run's settings with the request's own limit and seed."""
    from vllm import SamplingParams

    return SamplingParams(**(dict(settings) | {"max_tokens": request.max_tokens, "seed": request.seed}))


def sampled_logps(output) -> list[float]:
    """Log-probability of each sampled token of a vLLM `CompletionOutput`.

    vLLM lists the sampled token among the top ones, ordered by rank: it is found by its id, so that asking for more
    log-probs changes nothing.
    """
    return [logprobs[token_id].logprob for token_id, logprobs in zip(output.token_ids, output.logprobs, strict=True)]


@dataclass(frozen=True)
class Admission:
    """How many requests may be in an engine at once.

    A request with a seed has a generator of its own. Where a prompt is prefilled in parts, vLLM takes back what the
    sampler drew from it in between, which CPU generators cannot do. So on a CPU no prompt may be split: those that
    wait must fit into one step of the engine beside the tokens of all that run, and the cache must not fill up, as a
    request that is pushed out of it is prefilled anew.

    Attributes:
        prompt_tokens: tokens of prompts that may wait at once; a longer prompt is taken alone.
        block_size: tokens of a block of the cache.
        blocks: blocks that requests may fill when another one is taken.
    """

    prompt_tokens: int
    block_size: int
    blocks: int

    def allows(self, prompt: int, waiting: Collection[int], running: Collection[int]) -> bool:
        """Whether one more prompt may be taken.

        Args:
            prompt: tokens of the prompt.
            waiting: tokens of each prompt that is not prefilled yet.
            running: tokens of each request that is, its own prompt included.
        """
        if not waiting and not running:
            return True
        if sum(waiting) + prompt > self.prompt_tokens or any(tokens > self.prompt_tokens for tokens in waiting):
            return False
        # A step adds a token to each request, which may open a block.
        return sum(tokens // self.block_size + 1 for tokens in (*waiting, *running, prompt)) <= self.blocks


def admission_of(llm, requests: Sequence[GenerationRequest], on_cpu: bool) -> Admission | None:
    """What bounds the requests in an engine: seeds on a CPU, and nothing elsewhere (`None`)."""
    if not on_cpu or all(request.seed is None for request in requests):
        return None
    config = llm.llm_engine.vllm_config
    scheduler, cache = config.scheduler_config, config.cache_config
    room = scheduler.max_num_batched_tokens - scheduler.max_num_seqs
    return Admission(room, cache.block_size, int(0.75 * cache.num_gpu_blocks))


def run_requests(
    llm, requests: Sequence[GenerationRequest], settings: Mapping[str, object], on_cpu: bool
) -> Iterator[tuple[int, GeneratedTokens]]:
    """Yield each request's index with its sampled tokens, as they finish; new ones are taken as room comes.

    What a seed draws does not depend on when its request is taken, up to how the engine's floats depend on the other
    rows of a step.

    Args:
        llm: vLLM's `LLM`, or one that carries an adapter (`adapter`, a `LoRARequest`).
        requests: what is to be sampled.
        settings: of vLLM's `SamplingParams`; log-probs are given where they ask for them.
        on_cpu: whether the engine runs on a CPU.
    """
    from vllm.sampling_params import RequestOutputKind

    engine, admission = llm.llm_engine, admission_of(llm, requests, on_cpu)
    # Where admission has a bound, what each step adds must be seen; elsewhere only what is finished is.
    settings = {**settings, "output_kind": RequestOutputKind.DELTA if admission else RequestOutputKind.FINAL_ONLY}
    with_logps = settings.get("logprobs") is not None
    pending = deque(range(len(requests)))
    waiting: dict[int, int] = {}  # tokens of prompts that are not prefilled
    running: dict[int, int] = {}  # tokens of the others
    tokens: dict[int, list[int]] = {}
    logps: dict[int, list[float]] = {}
    while pending or waiting or running:
        while pending:
            index = pending[0]
            prompt = requests[index].prompt_ids
            if admission and not admission.allows(len(prompt), waiting.values(), running.values()):
                break
            engine.add_request(
                str(pending.popleft()),
                {"prompt_token_ids": prompt},
                sampling_params(settings, requests[index]),
                lora_request=getattr(llm, "adapter", None),
            )
            waiting[index] = len(prompt)
            tokens[index], logps[index] = [], []
        for output in engine.step():
            # The engine may append a suffix of its own to the id that it was given.
            index, sample = int(output.request_id.split("-")[0]), output.outputs[0]
            waiting.pop(index, None)
            tokens[index] += sample.token_ids
            if sample.logprobs is not None:
                logps[index] += sampled_logps(sample)
            running[index] = len(requests[index].prompt_ids) + len(tokens[index])
            if output.finished:
                del running[index]
                yield index, GeneratedTokens(tokens.pop(index), logps.pop(index) if with_logps else None)


def engine_of(model: str, settings: SamplingSettings, max_model_len: int):
    """A vLLM engine of a model or adapter for sequences of up to `max_model_len` tokens."""
    limit_cpu_cache()
    from vllm import LLM

    with merged_model(model, settings.dtype) as path:
        # The tokenizer stays out of vLLM: it would be loaded there by model type (see load_tokenizer).
        return LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype=computed_dtype(path, settings.dtype),
            seed=settings.seed,
            max_model_len=max_model_len,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
        )


def sample_with_vllm(
    model: str,
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    llm=None,
) -> Iterator[tuple[int, GeneratedTokens]]:
    """Yield each request's index with its sampled tokens, as they finish, in the engine `llm` or a new one."""
    llm = llm or engine_of(model, settings, max(len(r.prompt_ids) + r.max_tokens for r in requests))
    common = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stop_token_ids": end_token_ids(model, tokenizer),
        "detokenize": False,
    }
    yield from run_requests(llm, requests, common, on_cpu=not torch.cuda.is_available())
