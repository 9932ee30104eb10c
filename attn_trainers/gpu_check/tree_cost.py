"""What a training step of a published tree costs, rows against packed; benchmarks/tree_training.py tells it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from ..packing import pack_rows, packed_forward, token_log_probs, unique_tokens
from .measuring import take_turns
from .shapes import random_model


BRANCHES = 2  # continuations from each point


def measure(task: dict, model: PreTrainedModel | None = None) -> dict:
    """Shortest seconds per way, peak memory in MiB above the model, row tokens per unique token.

    Args:
        task: `length` of the rollout and of the `prompt` in tokens, branch `points` as shares of the length, number
            of `trees`, `shape` of the model, `ways`, `repeats` and `device`.
        model: on that device; `None` for a random one of `shape`.
    """
    run, ratio = prepare(task, model)
    taken = take_turns(run, task["ways"], task["repeats"], task["device"])
    seconds = {way: min(times) for way, times in taken["seconds"].items()}
    return {"seconds": seconds, "memory": taken["own"], "ratio": ratio}


def prepare(task: dict, model: PreTrainedModel | None = None) -> tuple[Callable[[str], None], float]:
    """The function that runs one way, and the ratio of tokens."""
    set_seed(0)
    prompt, length = task["prompt"], task["length"]
    if model is None:
        model = random_model(task["shape"], prompt + length, task["device"])
    trees = [sample_tree(prompt, length, task["points"], model.config.vocab_size) for _ in range(task["trees"])]

    def run(way: str) -> None:
        for rows in trees:
            (rows_logps if way == "rows" else packed_logps)(model, rows, prompt).mean().backward()
        model.zero_grad()

    ratio = sum(sum(map(len, rows)) for rows in trees) / sum(map(unique_tokens, trees))
    return run, ratio


def rows_logps(model: PreTrainedModel, rows: Sequence[list[int]], prompt: int) -> Tensor:
    """Log-probs of the completion tokens of rows of one length, rows end to end, forwarded as a batch."""
    ids = torch.tensor(rows, device=model.device)  # (B, T)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt + 1).logits[:, :-1]
    return token_log_probs(logits.flatten(0, 1), ids[:, prompt:].flatten())[0]


def packed_logps(model: PreTrainedModel, rows: Sequence[list[int]], prompt: int) -> Tensor:
    """The same, forwarded as one packed row."""
    return torch.cat(packed_forward(model, pack_rows(rows, [prompt] * len(rows)))[0])


def sample_tree(prompt: int, length: int, points: Sequence[float], vocab_size: int) -> list[list[int]]:
    """Rows of a rollout of random tokens and of its branches, which are as long."""

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,)).tolist()

    rollout = tokens(prompt + length)
    cuts = [prompt + round(point * length) for point in points for _ in range(BRANCHES)]
    return [rollout] + [rollout[:cut] + tokens(prompt + length - cut) for cut in cuts]
