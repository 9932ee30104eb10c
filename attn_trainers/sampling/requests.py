"""Sampling of completions with a seed each, by vLLM or transformers, from a model or a LoRA adapter."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .models import load_tokenizer
from .vllm import whole_prompt_calls


@dataclass(frozen=True)
class SampleRequest:
    """One completion to draw: prompt tokens and the seed of its own."""

    problem: int
    sample: int
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        temperature: 0 decodes greedily.
        max_new_tokens: token limit of a completion.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        batch_size: completions per batch (transformers only).
        gpu_memory_utilization: share of GPU memory that vLLM takes.
        tensor_parallel_size: GPUs that vLLM spreads the model over.
    """

    temperature: float = 0.6
    top_p: float = 1.0
    max_new_tokens: int = 32768
    seed: int = 0
    dtype: str = "auto"
    batch_size: int = 16
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1


def resolve_backend(backend: str) -> str:
    """`auto` is vLLM where it is installed."""
    return ("vllm" if importlib.util.find_spec("vllm") else "transformers") if backend == "auto" else backend


def count_thinking_tokens(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], token_ids: list[int]) -> int:
    """Tokens up to and including the first `</think>`; all if thinking was opened, not closed; 0 if never opened."""
    text = tokenizer.decode(token_ids)
    if "</think>" not in text:
        opened = "<think>" in text or tokenizer.decode(prompt_ids).rstrip().endswith("<think>")
        return len(token_ids) if opened else 0
    low, high = 1, len(token_ids)  # the shortest prefix whose text has the tag
    while low < high:
        middle = (low + high) // 2
        if "</think>" in tokenizer.decode(token_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return low


# Models ----------------------------------------------------------------------------------------------


def base_model_of(model: str) -> str | None:
    """The model that a LoRA adapter was trained on, `None` for a model that is no adapter."""
    if find_adapter_config_file(model) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(model).base_model_name_or_path


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model or adapter, else that of the adapter's base model."""
    base = base_model_of(model)
    if base is not None and not (Path(model) / "tokenizer_config.json").exists():
        return load_tokenizer(base)
    return load_tokenizer(model)


def load_model(model: str, dtype: str):
    """A model for generation; an adapter is merged into its base model."""
    base = base_model_of(model)
    loaded = AutoModelForCausalLM.from_pretrained(base or model, dtype=dtype)
    if base is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model).merge_and_unload()
    return loaded.eval()


def end_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the generation config (else of the config) and the tokenizer's own."""
    base = base_model_of(model) or model
    try:
        ids = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:  # the model has no generation config
        ids = AutoConfig.from_pretrained(base).eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@contextmanager
def merged_model(model: str, dtype: str) -> Iterator[str]:
    """Path of a model that vLLM can load: an adapter is merged into its base model in a temporary folder."""
    if base_model_of(model) is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        load_model(model, dtype).save_pretrained(folder)
        yield folder


# Sampling --------------------------------------------------------------------------------------------


class SeededSampling(LogitsProcessor):
    """Draws each row's next token with a generator of its own, whatever else is in the batch.

    The largest of logit plus Gumbel noise is a sample of the softmax, and greedy decoding then picks it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V)
        scores = scores.float()
        noise = torch.stack(
            [torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)]
        )
        return scores - noise.log()  # (B, V)


def sample_with_transformers(
    model: str, settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase, requests: Sequence[SampleRequest]
) -> Iterator[tuple[SampleRequest, list[int]]]:
    """Yield each request with its sampled tokens, batch by batch."""
    eos = end_token_ids(model, tokenizer)
    policy = load_model(model, settings.dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    policy.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    for start in range(0, len(requests), settings.batch_size):
        batch = requests[start : start + settings.batch_size]
        width = max(len(r.prompt_ids) for r in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)  # (B, P), padded on the left
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
            processors.append(SeededSampling([r.seed for r in batch], policy.device))
        with torch.inference_mode():
            output = policy.generate(
                input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device), logits_processor=processors
            )
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            yield request, row[:end]


def sample_with_vllm(
    model: str, settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase, requests: Sequence[SampleRequest]
) -> Iterator[tuple[SampleRequest, list[int]]]:
    """Yield each request with its sampled tokens, as they finish."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default takes much of the memory
    from vllm import LLM, SamplingParams

    eos = end_token_ids(model, tokenizer)
    with merged_model(model, settings.dtype) as path:
        # The tokenizer stays out of vLLM: it would be loaded there by model type (see load_tokenizer).
        llm = LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            seed=settings.seed,
            max_model_len=max(len(r.prompt_ids) for r in requests) + settings.max_new_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
        )
    engine = llm.llm_engine
    calls = [requests] if torch.cuda.is_available() else whole_prompt_calls(llm, requests)
    for call in calls:
        for i, request in enumerate(call):
            params = SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                seed=request.seed,
                stop_token_ids=eos,
                detokenize=False,
            )
            engine.add_request(str(i), {"prompt_token_ids": request.prompt_ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield call[int(output.request_id.split("-")[0])], list(output.outputs[0].token_ids)
