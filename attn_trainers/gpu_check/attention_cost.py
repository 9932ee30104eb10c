"""What the attention signals cost, against the forward they are read in; benchmarks/attention_scoring.py tells it."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..attention import (
    InfluenceObserver,
    KeyFocusObserver,
    RhythmObserver,
    forward_for_attention,
    middle_layers,
    observe_attention,
)
from .measuring import take_turns
from .shapes import SHAPES, random_model


ANSWER_SHARE = 0.1  # of the sequence, for the key-focus scores


def measure(task: dict, model: PreTrainedModel | None = None) -> dict:
    """Run the ways of one task in turn; seconds per way and repeat, peak memory in MiB.

    Args:
        task: `length` in tokens, `steps`, number of key-focus `heads`, `ways`, `repeats`, and `device` or `None`.
        model: on that device; `None` for a random one.
    """
    device = task["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    run = prepare(task, device, model)
    with torch.no_grad():
        if len(task["ways"]) > 1:
            for way in task["ways"]:
                run(way)  # warm-up: first calls allocate and choose kernels
        return take_turns(run, task["ways"], task["repeats"], device)


def prepare(task: dict, device: str, model: PreTrainedModel | None = None) -> Callable[[str], None]:
    """The function that runs one way: a name of benchmarks/attention_scoring.py."""
    set_seed(0)
    length, num_steps = task["length"], task["steps"]
    if model is None:
        model = random_model(SHAPES["wide" if device == "cpu" else "1p5b"], length, device).eval()
    config = model.config
    ids = torch.randint(0, config.vocab_size, (1, length), device=device)
    mask = torch.ones_like(ids)
    ranges = [even_ranges(length, num_steps)]
    layers = middle_layers(config.num_hidden_layers)
    heads = [(layers[i % len(layers)], i) for i in range(task["heads"])]
    answer = length - int(length * ANSWER_SHARE)
    thinking = [[(start, end) for start, end in ranges[0][1:] if end <= answer]]
    observers = {
        "fci": lambda: InfluenceObserver(mask, ranges),
        "heads": lambda: KeyFocusObserver(mask, thinking, [answer], heads),
        "rhythm": lambda: RhythmObserver(mask, [ranges[0][0][1]], layers),
    }

    def forward():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def run(way: str) -> None:
        if way == "plain":
            forward()
        elif way == "rhythm_alone":
            forward_for_attention(model, ids, mask, observers["rhythm"]())
        elif way == "eager":
            eager_influence(model, ids, mask, ranges[0])
        else:
            observer = observers[way]()
            with observe_attention(model, observer):
                forward()
            observer.result()

    return run


def even_ranges(length: int, num_steps: int) -> list[tuple[int, int]]:
    """Token ranges of a prompt, which is range 0, and as many steps of like length."""
    edges = torch.linspace(0, length, num_steps + 2).long().tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def eager_influence(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    ranges: list[tuple[int, int]],
    delta: int = 4,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Influence from eager attention maps, (steps,): what the fused way replaces; pooled in `dtype`, the model's."""
    dtype = dtype or model.dtype
    steps = torch.zeros(len(ranges), ids.shape[1], dtype=dtype, device=ids.device)  # (S, T)
    for step, (start, end) in enumerate(ranges):
        steps[step, start:end] = 1.0 / (end - start)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, output_attentions=True
    ).attentions
    model.set_attn_implementation(usual)
    later = torch.ones(len(ranges), len(ranges), device=ids.device).tril(-delta)  # [j, k]: j >= k + delta
    influence = torch.zeros(len(ranges), device=ids.device)
    for maps in output:  # (1, H, T, T)
        pooled = torch.einsum("jt,htu,ku->hjk", steps, maps[0].to(dtype), steps)
        influence = influence.maximum((pooled * later).sum(dim=1).amax(dim=0))
    return influence
