"""Sampling in several rounds from one model, which is loaded once."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from .backends import resolve_backend, sample_completions
from .requests import GeneratedTokens, GenerationRequest, SamplingSettings
from .vllm import engine_of, sample_with_vllm


class SamplingSession:
    """`sample_completions` whose vLLM engine outlives a round; transformers loads its model for each.

    Args:
        backend: one of `BACKENDS`.
        model: folder or Hub id of a model or an adapter; it is loaded at the first request.
        settings: how completions are drawn.
        tokenizer: of the model.
        max_model_len: tokens of the longest sequence, prompt included.
    """

    def __init__(
        self,
        backend: str,
        model: str,
        settings: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
    ):
        self.backend, self.model, self.settings, self.tokenizer = resolve_backend(backend), model, settings, tokenizer
        self.max_model_len = max_model_len
        self._engine = None

    def sample(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, GeneratedTokens]]:
        """Yield the index of each request with its sampled tokens, in the order in which they finish."""
        if self.backend != "vllm" or not requests:
            yield from sample_completions(self.backend, self.model, self.settings, self.tokenizer, requests)
            return
        if self._engine is None:
            self._engine = engine_of(self.model, self.settings, self.max_model_len)
        yield from sample_with_vllm(self.model, self.settings, self.tokenizer, requests, self._engine)
