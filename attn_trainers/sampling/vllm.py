"""What trainers and evaluation need of a vLLM engine. vLLM itself is imported where it is first used."""

import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .models import end_token_ids, merged_model
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


def engine_calls(llm, requests: Sequence[GenerationRequest], on_cpu: bool) -> list[list[int]]:
    """Indices of the requests of each call to the engine: all in one, but for seeded requests on a CPU.

    A request with a seed has a generator of its own. Where a prompt is prefilled in chunks, vLLM takes back what the
    sampler drew from it in between, which CPU generators cannot do: so there a call holds no more prompt tokens than
    one engine step takes.

    Args:
        llm: vLLM's `LLM`.
        requests: what is to be sampled.
        on_cpu: whether the engine runs on a CPU.
    """
    if not on_cpu or all(request.seed is None for request in requests):
        return [list(range(len(requests)))]
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    room = scheduler.max_num_batched_tokens - scheduler.max_num_seqs
    calls: list[list[int]] = [[]]
    used = 0
    for index, request in enumerate(requests):
        used += len(request.prompt_ids)
        if used > room and calls[-1]:
            calls.append([])
            used = len(request.prompt_ids)
        calls[-1].append(index)
    return calls


def generate_with_engine(
    llm, requests: Sequence[GenerationRequest], settings: Mapping[str, object], on_cpu: bool
) -> list[GeneratedTokens]:
    """Sample every request and wait for all; `settings` must ask for log-probs."""
    outputs = []
    for call in engine_calls(llm, requests, on_cpu):
        outputs += llm.generate(
            [{"prompt_token_ids": requests[i].prompt_ids} for i in call],
            sampling_params=[sampling_params(settings, requests[i]) for i in call],
            use_tqdm=False,
        )
    samples = [output.outputs[0] for output in outputs]
    return [GeneratedTokens(list(sample.token_ids), sampled_logps(sample)) for sample in samples]


def engine_of(model: str, settings: SamplingSettings, max_model_len: int):
    """A vLLM engine of a model or adapter for sequences of up to `max_model_len` tokens."""
    limit_cpu_cache()
    from vllm import LLM

    with merged_model(model, settings.dtype) as path:
        # The tokenizer stays out of vLLM: it would be loaded there by model type (see load_tokenizer).
        return LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype=settings.dtype,
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
    engine = llm.llm_engine
    common = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stop_token_ids": end_token_ids(model, tokenizer),
        "detokenize": False,
    }
    for call in engine_calls(llm, requests, on_cpu=not torch.cuda.is_available()):
        for i in call:
            prompt = {"prompt_token_ids": requests[i].prompt_ids}
            engine.add_request(str(i), prompt, sampling_params(common, requests[i]))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    # The engine may append a suffix of its own to the id that it was given.
                    yield int(output.request_id.split("-")[0]), GeneratedTokens(list(output.outputs[0].token_ids))
