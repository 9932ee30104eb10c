"""Steps on the tokens that were sampled.

A step is found in the text and used on tokens. Tokenising the text again would not give the sampled ids back, so the
characters of each sampled token are found by decoding the ids piece by piece.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .steps import END_OF_THINKING, Step


REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character (yet)
_WINDOW = 16  # tokens decoded together before the window moves on
_LONGEST_WAIT = 64  # tokens after which the window moves on even if they gave no character


@dataclass
class StepAlignment:
    """Token ranges of a completion's reasoning steps.

    Attributes:
        step_ranges: Half-open (start, end) token ranges, relative to the completion. They are contiguous, start at 0
            and end at the first token of `</think>`; empty when `reason` is set.
        kinds: Kind of each step.
        texts: Text of each step; together they are the thinking text.
        answer_start: First token after `</think>`; the answer runs from there to the end of the completion, its
            end-of-sequence token included. None without a unique `</think>`.
        reason: Why the completion has no usable steps, or None: "no_end_of_thinking", "several_end_of_thinking",
            "no_answer" (nothing after `</think>`), "too_few_steps" (fewer than two).
    """

    step_ranges: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answer_start: int | None = None
    reason: str | None = None


def token_char_spans(tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text of sampled ids and the characters each id stands for.

    The ids are decoded in a sliding window that begins a few tokens back, so that a decoder that strips the space
    before its first token strips it from a token already accounted for. Text that ends in the replacement character
    may be a character whose bytes are spread over several tokens; it waits for the next token. Linear in the number of
    ids.

    The text is that of decoding all ids at once, but for a run of SentencePiece byte tokens with an invalid byte:
    there, decoding at once replaces the run's valid characters too, while some of them may be kept here.

    Args:
        tokenizer: A transformers tokenizer.
        ids: (n,) token ids, special ones included; they are decoded to their text.

    Returns:
        The text, and per token a half-open (start, end) of offsets into it. Starts and ends never decrease, and the
        spans cover the text. Tokens that share a character all have it in their span; one without text has an empty
        span.
    """
    reader = _SpanReader(tokenizer, [int(token) for token in ids])
    return reader.read()


class _SpanReader:
    """One pass over the ids. `known` is the decoded window ids[window : next], whose first character is at `base`."""

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids = tokenizer, ids
        self.window, self.base, self.known = 0, 0, ""
        self.group = 0  # first token since the text was last complete
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.chunks: list[str] = []  # settled text in front of the window
        self.settled = 0  # offset up to which the text is complete

    def decode(self, begin: int, end: int) -> str:
        # Cleaning up spaces would change characters that are already accounted for.
        return self.tokenizer.decode(
            self.ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def read(self) -> tuple[str, list[tuple[int, int]]]:
        for index in range(len(self.ids)):
            text = self.decode(self.window, index + 1)
            waited = index + 1 - self.group >= _LONGEST_WAIT
            complete = text if waited else text.rstrip(REPLACEMENT)
            # Replacement characters that stay in front of new text are characters of their own, not a beginning.
            stays = len(complete) > len(self.known) and complete.startswith(self.known)
            self.starts.append(max(self.settled, self.base + len(self.known)) if stays else self.settled)
            self.ends.append(self.base + len(text))
            grown = self.base + len(complete) > self.settled
            self.settled = max(self.settled, self.base + len(complete))
            self.known = text
            if waited or (grown and len(complete) == len(text)):
                self._close_group(index + 1)
        return self._result()

    def _close_group(self, end: int) -> None:
        for token in range(self.group, end):
            self.ends[token] = min(self.ends[token], self.settled)
        if end - self.window >= _WINDOW:
            context = self.decode(self.group, end)
            # The next window begins with this group. It takes the stripped space, so it must have text of its own.
            if context or end - self.window >= _LONGEST_WAIT:
                passed = max(len(self.known) - len(context), 0)
                self.chunks.append(self.known[:passed])
                self.window, self.base, self.known = self.group, self.base + passed, self.known[passed:]
        self.group = end

    def _result(self) -> tuple[str, list[tuple[int, int]]]:
        text = "".join(self.chunks) + self.known
        spans, start, end = [], 0, 0
        for token_start, token_end in zip(self.starts, self.ends, strict=True):
            start = min(max(start, token_start), len(text))
            end = max(end, start, min(token_end, len(text)))
            spans.append((start, end))
        return text, spans


def reasoning_step_ranges(
    tokenizer,
    completion_ids: Sequence[int],
    *,
    splitter: Callable[[str], list[Step]],
    end_of_thinking: str = END_OF_THINKING,
) -> StepAlignment:
    """Token ranges of the reasoning steps of one sampled completion.

    A token belongs to the step that holds its first character that is no white space (its first character if it has no
    other), since tokens carry the space before their word. Every token before `</think>` is in exactly one step; a
    token that holds any character of `</think>` is in none. A step that gets no token is merged into its neighbour.

    Args:
        tokenizer: The tokenizer that the ids belong to.
        completion_ids: (n,) sampled ids without padding.
        splitter: Cuts the thinking text into steps that partition it, e.g. `split_reasoning`.
        end_of_thinking: The text that ends the thinking, of one token or several.

    Returns:
        The ranges, or none and the reason.
    """
    text, spans = token_char_spans(tokenizer, completion_ids)
    marker = text.find(end_of_thinking)
    if marker < 0:
        return StepAlignment(reason="no_end_of_thinking")
    marker_end = marker + len(end_of_thinking)
    if text.find(end_of_thinking, marker_end) >= 0:
        return StepAlignment(reason="several_end_of_thinking")
    # Starts and ends never decrease, so the tokens that hold a character of the marker are found by bisection.
    thinking_end = bisect_left(spans, marker + 1, key=lambda span: span[1])
    answer_start = bisect_left(spans, marker_end, key=lambda span: span[0])
    if answer_start == len(spans):
        return StepAlignment(answer_start=answer_start, reason="no_answer")

    thinking = text[:marker]
    anchors = [_anchor(thinking, start, end) for start, end in spans[:thinking_end]]
    ranges, kinds, texts = _token_ranges(splitter(thinking), thinking, anchors)
    if len(ranges) < 2:
        return StepAlignment(answer_start=answer_start, reason="too_few_steps")
    return StepAlignment(ranges, kinds, texts, answer_start)


def _anchor(thinking: str, start: int, end: int) -> int:
    """Offset of the character that decides which step a token belongs to."""
    piece = thinking[start:end]
    return start + len(piece) - len(piece.lstrip()) if piece.strip() else start


def _token_ranges(steps: list[Step], thinking: str, anchors: list[int]):
    """Token range, kind and text of each step that has a token. anchors: (thinking tokens,), never decreasing."""
    begins = [bisect_left(anchors, step.start) for step in steps]
    ends = [*begins[1:], len(anchors)][: len(steps)]
    ranges, kinds, texts, lead = [], [], [], ""
    for step, begin, end in zip(steps, begins, ends, strict=True):
        piece = thinking[step.start : step.end]
        if begin < end:
            ranges.append((begin, end))
            kinds.append(step.kind)
            texts.append(lead + piece)
            lead = ""
        elif texts:
            texts[-1] += piece
        else:
            lead += piece
    return ranges, kinds, texts
