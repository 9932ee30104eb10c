"""The text of sampled tokens, and the characters each token stands for.

What is found in the text is used on tokens. Tokenising the text again would not give the sampled ids back, so the
characters of each sampled token are found by decoding the ids piece by piece.
"""

from collections.abc import Sequence
from itertools import accumulate


REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character (yet)
_WINDOW = 16  # tokens decoded together before the window moves on
_LONGEST_WAIT = 64  # tokens after which the window moves on even if they gave no character


def decoded(tokenizer, ids: Sequence[int]) -> str:
    """Text of ids, special tokens kept and no space cleaned up, so that offsets into it stay true."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_char_spans(tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text of sampled ids and the characters each id stands for.

    Where the texts of the single tokens, put together, are the whole text, each token stands for its own. Else some
    character is spread over several tokens, or the decoder strips spaces: the ids are decoded in a sliding window that
    begins a few tokens back, so that a decoder that strips the space before its first token strips it from a token
    already accounted for. Text that ends in the replacement character may be a character whose bytes are spread over
    several tokens; it waits for the next token. Linear in the number of ids.

    The text is that of decoding all ids at once, but for a run of SentencePiece byte tokens with an invalid byte:
    there, decoding at once replaces the run's valid characters too, while some of them may be kept here.

    Args:
        tokenizer: a transformers tokenizer.
        ids: (n,) token ids, special ones included; they are decoded to their text.

    Returns:
        The text, and per token a half-open (start, end) of offsets into it. Starts and ends never decrease, and the
        spans cover the text. Tokens that share a character all have it in their span; one without text has an empty
        span.
    """
    ids = [int(token) for token in ids]
    text_of = {token: decoded(tokenizer, [token]) for token in set(ids)}
    text = "".join(text_of[token] for token in ids)
    if REPLACEMENT not in text and text == decoded(tokenizer, ids):
        ends = list(accumulate(len(text_of[token]) for token in ids))
        return text, list(zip([0, *ends], ends, strict=False))
    return _SpanReader(tokenizer, ids).read()


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
        return decoded(self.tokenizer, self.ids[begin:end])

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
