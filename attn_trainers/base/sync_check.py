"""Whether a vLLM engine computes what the trainer computes, found out with the first push of weights.

The first push sends what the engine has loaded itself. If the log-probs of a short probe then differ from the
trainer's by more than before, the push is wrong for this model, and a run would sample from a policy that nobody
trains.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, cycle, islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


PROBE_TOKENS = 48
PROBE_PROMPTS = 8
# Largest share of the spread of the probe's log-probs by which engine and trainer may differ: rounding in bfloat16
# leaves below 0.01.
TOLERANCE = 0.05


def probe_tokens(prompts: Iterable[str | list[dict]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of what the prompts say, one after the other and from the start again, until there are enough.

    A probe must be text of the kind that the model knows. On tokens drawn at random rounding is no longer small:
    bfloat16 moves the log-probs of Qwen2.5-Coder-0.5B by 0.57 nats there, and by 0.02 on problems of GSM8K.

    Args:
        prompts: of the run, as TRL takes them; the first few are enough.
        tokenizer: of the model.
    """
    text = " ".join(_said(prompt) for prompt in islice(prompts, PROBE_PROMPTS))
    tokens = tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    return list(islice(cycle(tokens), PROBE_TOKENS))


def _said(prompt: str | list[dict]) -> str:
    """The text of a prompt, without roles and templates."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or "" for message in prompt]
    blocks = chain.from_iterable([{"text": c}] if isinstance(c, str) else c for c in contents)
    return " ".join(block.get("text") or "" for block in blocks)


def engine_logps(llm, tokens: list[int]) -> Tensor:
    """Log-probs (T - 1,) of a prompt's tokens behind the first in a vLLM `LLM`; no temperature or other settings."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], sampling_params=params, use_tqdm=False)
    pairs = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
    return torch.tensor([logprobs[token].logprob for logprobs, token in pairs])


def push_error(architectures: list[str] | None, error: Exception) -> str:
    """One line on a first push that the engine did not take, for a model of these architectures."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    name = ", ".join(architectures or ["this model"])
    return (
        f"use_vllm=True does not go with {name}: vLLM cannot take the trainer's weights ({reason}); set use_vllm to "
        "False, or use another model."
    )


@dataclass(frozen=True)
class SyncReadings:
    """Mean |log-prob of the trainer - of the engine| on the probe, in nats.

    Attributes:
        after: after the push.
        before: with the weights that the engine loaded itself; `None` where it has none, or others.
        spread: standard deviation of the trainer's log-probs on the probe.
    """

    after: float
    before: float | None
    spread: float

    @property
    def bound(self) -> float:
        """Largest difference that a right push leaves."""
        apart = TOLERANCE * self.spread
        return apart if self.before is None else min(apart, 3 * self.before + 1e-3 * self.spread)

    @property
    def is_right(self) -> bool:
        return math.isfinite(self.after) and self.after <= self.bound

    def error(self, architectures: list[str] | None) -> str:
        """One line on a push that is wrong, for a model of these architectures."""
        before = "" if self.before is None else f", {self.before:.2g} with the weights that it loaded itself"
        name = ", ".join(architectures or ["this model"])
        return (
            f"use_vllm=True does not go with {name}: after a push of the trainer's weights, log-probs of vLLM and of "
            f"the trainer differ by {self.after:.2g} on a probe{before} (rounding leaves at most {self.bound:.2g}), "
            "and it would sample from another policy; set use_vllm to False, or use another model."
        )
