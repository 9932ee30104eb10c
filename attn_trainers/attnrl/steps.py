"""Paragraph steps of a completion, on its token ids (AttnRL, arXiv 2509.26628, section 3.1.1)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepDelimiters:
    """Tokens at which steps end.

    Attributes:
        paragraph: ids whose text contains a blank line.
        newline: ids whose text contains a newline, `paragraph` among them.
        end_of_thinking: id of the token that ends the thinking part, or `None`.
    """

    paragraph: frozenset[int]
    newline: frozenset[int]
    end_of_thinking: int | None

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, end_of_thinking: str | None = "</think>"
    ) -> "StepDelimiters":
        """Decode every id of the base vocabulary alone; two adjacent newline tokens make no blank line.

        Args:
            tokenizer: the model's tokenizer.
            end_of_thinking: text that ends the thinking part; `None` for a model without one. Where the tokenizer
                makes several tokens of it, none is looked for, with a warning: the last one (`>`) ends other text too.
        """
        ids = range(tokenizer.vocab_size)
        texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        newline = frozenset(i for i, text in zip(ids, texts, strict=True) if "\n" in text)
        paragraph = frozenset(i for i in newline if "\n\n" in texts[i])
        end = tokenizer.encode(end_of_thinking, add_special_tokens=False) if end_of_thinking else []
        if len(end) > 1:
            logger.warning(
                "end_of_thinking=%r is %d tokens to this tokenizer; steps after it are branched like those before.",
                end_of_thinking,
                len(end),
            )
        return cls(paragraph, newline, end[0] if len(end) == 1 else None)


@dataclass(frozen=True)
class StepSegmentation:
    """Steps of one sequence.

    Attributes:
        ranges: half-open token ranges; entry 0 is the whole prompt, entry 1 the first step of the completion.
            Positions count from the first real token of the sequence.
        stop_step: index in `ranges` of the step that holds the last end of thinking, -1 without one.
    """

    ranges: list[tuple[int, int]]
    stop_step: int

    @property
    def num_steps(self) -> int:
        """Steps of the completion."""
        return len(self.ranges) - 1


def segment_steps(prompt_length: int, completion_ids: Sequence[int], delimiters: StepDelimiters) -> StepSegmentation:
    """Cut a completion after its paragraph delimiters; where it has none, after newlines; else after every token.

    Args:
        prompt_length: real tokens of the prompt, at least 1.
        completion_ids: real tokens of the completion.
        delimiters: of the tokenizer.

    Returns:
        Ranges that partition the sequence. A delimiter belongs to the step it ends.

    Raises:
        ValueError: for a prompt without tokens.
    """
    if prompt_length < 1:
        raise ValueError(f"prompt_length={prompt_length} leaves no prompt; it must be at least 1 token.")
    cuts: Sequence[int] = range(len(completion_ids))
    for table in (delimiters.paragraph, delimiters.newline):
        found = [t for t, token in enumerate(completion_ids) if token in table]
        if found:
            cuts = found
            break
    bounds = [0, prompt_length, *(prompt_length + t + 1 for t in cuts)]
    end = prompt_length + len(completion_ids)
    if bounds[-1] != end:
        bounds.append(end)
    ranges = list(zip(bounds, bounds[1:], strict=False))
    return StepSegmentation(ranges, _stop_step(prompt_length, completion_ids, ranges, delimiters.end_of_thinking))


def _stop_step(
    prompt_length: int, completion_ids: Sequence[int], ranges: Sequence[tuple[int, int]], end_of_thinking: int | None
) -> int:
    positions = [t for t, token in enumerate(completion_ids) if token == end_of_thinking]
    if not positions:
        return -1
    position = prompt_length + positions[-1]
    return next(index for index, (start, end) in enumerate(ranges) if start <= position < end)
