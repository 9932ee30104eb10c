"""Steps of a completion, on its token ids (AttnRL, arXiv 2509.26628, section 3.1.1).

The published steps are paragraphs, told token by token. Short answers have few of them, and influence is zero for the
last steps, so lines and sentences, told by the decoded text, give branching more to choose from.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..thinking import END_OF_THINKING, EndOfThinking, special_ids
from ..token_spans import token_char_spans


STEP_MODES = ("paragraphs", "lines", "sentences")

_LINE_END = r"\n(?:\s*\n)?"
_CLOSERS = r"[\"'”’»)\]}」』）】*_`$]*"
# In order: what only looks like an end is passed over; then ends of lines and sentences, with the closing quotes,
# brackets and emphasis, and the line ends, that follow.
_SENTENCE_END = re.compile(
    rf"""(?m:^[^\S\n]*(?:[-*+#>][^\S\n]*)*\d+[.)](?=\s))             # a number that opens an item of a list
    | (?<![A-Za-z.])[A-Za-z]\.(?:[A-Za-z]\.)+(?=[^\S\n])             # e.g. and its like
    | (?P<end>(?: (?<![.!?])(?:[.?]|(?<!\d)!)[.!?]*{_CLOSERS}(?=\s|\Z) | [。！？｡]+{_CLOSERS} )(?:\s*\n)?
    | {_LINE_END})""",
    re.VERBOSE,
)
_LINE = re.compile(rf"(?P<end>{_LINE_END})")


@dataclass(frozen=True)
class StepDelimiters:
    """Where the steps of a run's completions end.

    Attributes:
        paragraph: ids whose text contains a blank line.
        newline: ids whose text contains a newline, `paragraph` among them.
        thinking: finds the end of the thinking; `None` for a model without one.
        mode: "paragraphs" (published), "lines" or "sentences".
        tokenizer: decodes lines and sentences; paragraphs need none.
    """

    paragraph: frozenset[int]
    newline: frozenset[int]
    thinking: EndOfThinking | None = None
    mode: str = "paragraphs"
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        end_of_thinking: str | None = END_OF_THINKING,
        step_mode: str = "paragraphs",
    ) -> "StepDelimiters":
        """Decode every id of the base vocabulary alone; two adjacent newline tokens make no blank line.

        Args:
            tokenizer: the model's tokenizer.
            end_of_thinking: text that ends the thinking part; empty or `None` for a model without one.
            step_mode: what a step is, one of `STEP_MODES`.

        Raises:
            ValueError: for an unknown `step_mode`.
        """
        if step_mode not in STEP_MODES:
            raise ValueError(f"step_mode={step_mode!r} is unknown; set it to one of {', '.join(STEP_MODES)}.")
        ids = range(tokenizer.vocab_size)
        texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        newline = frozenset(i for i, text in zip(ids, texts, strict=True) if "\n" in text)
        paragraph = frozenset(i for i in newline if "\n\n" in texts[i])
        thinking = EndOfThinking(tokenizer, end_of_thinking) if end_of_thinking else None
        return cls(paragraph, newline, thinking, step_mode, tokenizer)

    def cuts(self, completion_ids: Sequence[int]) -> list[int]:
        """Tokens after which a step ends, ascending; every token where the completion has no delimiter."""
        if self.mode == "paragraphs":
            for table in (self.paragraph, self.newline):
                found = [t for t, token in enumerate(completion_ids) if token in table]
                if found:
                    return found
        else:
            found = self._cuts_of_text(completion_ids)
        return found or list(range(len(completion_ids)))

    def _cuts_of_text(self, completion_ids: Sequence[int]) -> list[int]:
        """The tokens that hold the last character of a line or sentence. Blank text and special tokens are no step."""
        text, spans = token_char_spans(self.tokenizer, completion_ids)
        special = special_ids(self.tokenizer)
        written = next((t for t in reversed(range(len(spans))) if int(completion_ids[t]) not in special), -1)
        found: list[int] = []
        previous = 0
        for match in (_LINE if self.mode == "lines" else _SENTENCE_END).finditer(text):
            end = match.end()
            if match["end"] is None or not text[previous:end].strip():
                continue
            previous = end
            cut = bisect_left(spans, end, key=lambda span: span[0]) - 1
            if cut < written and (not found or cut > found[-1]):
                found.append(cut)
        return found


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
    """Cut a completion into steps.

    - "paragraphs": after the tokens with a blank line; where it has none, after newlines; else after every token.
    - "lines": after the last token of each line's end, blank lines with the line before them.
    - "sentences": there, and after `.`, `!` or `?` with white space or nothing behind it, and `。`, `！` or `？`; not
      within a number ("3.14"), after an abbreviation of single letters ("e.g."), the number of an item ("1.") or a
      factorial ("5!").

    A completion without a line's (sentence's) end is cut after every token too.

    Args:
        prompt_length: real tokens of the prompt, at least 1.
        completion_ids: real tokens of the completion.
        delimiters: of the tokenizer.

    Returns:
        Ranges that partition the sequence. A delimiter belongs to the step it ends; so does the token that holds the
        last character of one spread over several.

    Raises:
        ValueError: for a prompt without tokens.
    """
    if prompt_length < 1:
        raise ValueError(f"prompt_length={prompt_length} leaves no prompt; it must be at least 1 token.")
    bounds = [0, prompt_length, *(prompt_length + t + 1 for t in delimiters.cuts(completion_ids))]
    end = prompt_length + len(completion_ids)
    if bounds[-1] != end:
        bounds.append(end)
    ranges = list(zip(bounds, bounds[1:], strict=False))
    last = delimiters.thinking.last_end(completion_ids) if delimiters.thinking else None
    if last is None:
        return StepSegmentation(ranges, -1)
    position = prompt_length + last[1] - 1  # of the token that completes it
    return StepSegmentation(ranges, next(i for i, (start, end) in enumerate(ranges) if start <= position < end))
