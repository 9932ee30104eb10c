"""Batched generation by transformers with a limit and a seed per request: a trainer's model, or one loaded for it."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from transformers import (
    EpsilonLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .models import end_token_ids, load_model
from .requests import GeneratedTokens, GenerationRequest, SamplingSettings, cut_completion


# Settings of a GenerationConfig that shape the distribution, in the order in which `generate` applies them: the value
# that changes nothing, the value of which `generate` does not warn where nothing is drawn, and what applies it.
_WARPERS = {
    "temperature": (1.0, 1.0, TemperatureLogitsWarper),
    "top_k": (0, 50, TopKLogitsWarper),
    "top_p": (1.0, 1.0, TopPLogitsWarper),
    "min_p": (0.0, None, MinPLogitsWarper),
    "typical_p": (1.0, 1.0, TypicalLogitsWarper),
    "epsilon_cutoff": (0.0, 0.0, EpsilonLogitsWarper),
}
_UNSEEDED = {"top_h": None, "eta_cutoff": 0.0, "num_beams": 1}


class TokenBudget(StoppingCriteria):
    """Ends each row at its own limit of new tokens."""

    def __init__(self, prompt_width: int, limits: torch.Tensor):
        self.prompt_width = prompt_width
        self.limits = limits  # (B,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        limits = self.limits.repeat_interleave(len(input_ids) // len(self.limits))  # beams of a row follow each other
        return (input_ids.shape[1] - self.prompt_width) >= limits.to(input_ids.device)


class SeededSampling(LogitsProcessor):
    """Draws each row's next token with a generator of its own, whatever else is in the batch.

    The largest of logit plus Gumbel noise is a sample of the softmax, and greedy decoding then picks it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V)
        scores = scores.float()
        noise = torch.stack(
            [torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)]
        )
        return scores - noise.log()  # (B, V)


def seeded_config(
    config: GenerationConfig, requests: Sequence[GenerationRequest], device: torch.device | str
) -> tuple[GenerationConfig, LogitsProcessorList]:
    """The config and the processors with which `generate` samples each row by its seed.

    Where no request has a seed, or nothing is drawn, that is the config as it stands. Otherwise the config decodes
    greedily what the processors warped and drew; a row without a seed takes one from torch's global generator.

    Raises:
        ValueError: for a setting with which `generate` cannot sample by seeds.
    """
    if not config.do_sample or all(request.seed is None for request in requests):
        return config, LogitsProcessorList()
    for name, neutral in _UNSEEDED.items():
        if getattr(config, name) not in (None, neutral):
            raise ValueError(
                f"generation_kwargs={{{name!r}: {getattr(config, name)}}} cannot go with seeds; leave {name} out."
            )
    processors = LogitsProcessorList()
    greedy = copy(config)
    greedy.do_sample = False
    for name, (neutral, silent, warper) in _WARPERS.items():
        value = getattr(config, name)
        if value is not None and value != neutral:
            processors.append(warper(value))
        setattr(greedy, name, silent)
    seeds = [torch.randint(2**62, ()).item() if r.seed is None else r.seed for r in requests]
    processors.append(SeededSampling(seeds, device))
    return greedy, processors


def generate_batch(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], config: GenerationConfig, device: torch.device | str
) -> list[list[int]]:
    """Sample the requests as one left-padded batch.

    The caller supplies what surrounds the model: no gradients, and gathered weights where they are sharded.

    Args:
        model: the model, ready to generate.
        requests: at least one.
        config: sampling settings, with `eos_token_id` and `pad_token_id`; the limit is the requests' own.
        device: of the model.

    Returns:
        The sampled tokens of each request, its EOS kept, at most `max_tokens` of them.
    """
    limits = torch.tensor([request.max_tokens for request in requests])  # (B,)
    width = max(len(request.prompt_ids) for request in requests)
    input_ids = torch.full((len(requests), width), config.pad_token_id)  # (B, P), padded on the left
    attention_mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        start = width - len(request.prompt_ids)
        input_ids[row, start:] = torch.tensor(request.prompt_ids)
        attention_mask[row, start:] = 1
    config, processors = seeded_config(config, requests, device)
    config = copy(config)
    config.max_new_tokens = int(limits.max())
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([TokenBudget(width, limits)]),
    )
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    return [
        cut_completion(tokens, request.max_tokens, ends)
        for tokens, request in zip(output[:, width:].tolist(), requests, strict=True)
    ]


def sample_with_transformers(
    model: str, settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[int, GeneratedTokens]]:
    """Yield each request's index with its sampled tokens, batch by batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_model(model, settings.dtype).to(device)
    draws = settings.temperature > 0
    config = GenerationConfig(
        do_sample=draws, eos_token_id=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    policy.generation_config = copy(config)  # what the model was saved with fills no gap
    if draws:
        config.update(temperature=settings.temperature, top_p=settings.top_p, top_k=0)
    for start in range(0, len(requests), settings.batch_size):
        with torch.inference_mode():
            batch = generate_batch(policy, requests[start : start + settings.batch_size], config, device)
        for index, token_ids in enumerate(batch, start=start):
            yield index, GeneratedTokens(token_ids)
