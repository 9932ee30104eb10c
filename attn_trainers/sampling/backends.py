"""The choice of what draws the completions of a model that is not in training."""

import importlib.util
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from .requests import GeneratedTokens, GenerationRequest, SamplingSettings
from .transformers import sample_with_transformers
from .vllm import sample_with_vllm


BACKENDS = ("auto", "vllm", "transformers")


def resolve_backend(backend: str) -> str:
    """`auto` is vLLM where it is installed."""
    return ("vllm" if importlib.util.find_spec("vllm") else "transformers") if backend == "auto" else backend


def sample_completions(
    backend: str,
    model: str,
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
) -> Iterator[tuple[int, GeneratedTokens]]:
    """Yield the index of each request with its sampled tokens, in the order in which they finish.

    Args:
        backend: one of `BACKENDS`.
        model: folder or Hub id of a model or an adapter; it is loaded only if there is a request.
        settings: how completions are drawn.
        tokenizer: of the model.
        requests: what is to be drawn.
    """
    if not requests:
        return
    sample = sample_with_vllm if resolve_backend(backend) == "vllm" else sample_with_transformers
    yield from sample(model, settings, tokenizer, requests)
