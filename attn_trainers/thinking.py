r"""Where the thinking of a completion ends and its answer begins: one notion for rewards, steps, lengths and metrics.

`ThinkingTags` knows the text that ends the thinking and the one that opens it, and works on text. `EndOfThinking` adds
a tokenizer and works on sampled ids. Tags are sought in the text that the ids stand for, special tokens kept, so it
makes no difference whether a tag is one token, several, or ends inside one ("</", "think", ">\n\n").

`answer_start` is for models that write no tags.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from .token_spans import decoded, token_char_spans


END_OF_THINKING = "</think>"

ANSWERS = ("tag", "last_boxed", "last_paragraph")

_BOX_OR_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_FILLED = re.compile(r"\S")
_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*\n\s*")


def _opening_of(end: str) -> str | None:
    """`<think>` for `</think>`, `[THINK]` for `[/THINK]`: the end without its slash; None for an end without one."""
    return end.replace("/", "", 1) if "/" in end else None


@dataclass(frozen=True)
class ThinkingTags:
    """The texts around the thinking.

    Attributes:
        end: text that ends the thinking.
        opening: text that opens it; by default `end` without its first slash. None where there is no such text:
            whether thinking was opened is then not known.

    Raises:
        ValueError: for an empty end.
    """

    end: str = END_OF_THINKING
    opening: str | None = None

    def __post_init__(self):
        if not self.end:
            raise ValueError(f"end_of_thinking={self.end!r} is empty; set it to the text that ends the thinking.")
        if self.opening is None:
            object.__setattr__(self, "opening", _opening_of(self.end))

    def state_of_prompt(self, prompt: str) -> str:
        """What a rendered prompt ends in: "opened" or "closed" thinking, or "none" where opening is the model's."""
        prompt = prompt.rstrip()
        if self.opening and prompt.endswith(self.opening):
            return "opened"
        return "closed" if prompt.endswith(self.end) else "none"

    def body_start(self, completion: str) -> int:
        """Where the thinking's text begins: after the opening, if the completion begins with one, else 0."""
        blank = len(completion) - len(completion.lstrip())
        if self.opening and completion.startswith(self.opening, blank):
            return blank + len(self.opening)
        return 0

    def answer_text(self, completion: str) -> str:
        """The part of a completion that counts: after the last end of thinking, or all of it."""
        return completion.rpartition(self.end)[2]

    def closes_once(self, completion: str) -> bool:
        """Whether a completion ends its thinking once and opens none but, maybe, that one, at its beginning."""
        body = completion[self.body_start(completion) :]
        return body.count(self.end) == 1 and not (self.opening and self.opening in body)


class EndOfThinking:
    """The thinking tags of a model, on the ids that it reads and writes.

    Args:
        tokenizer: a transformers tokenizer.
        end_of_thinking: text that ends the thinking.
        opening: as in `ThinkingTags`.

    Attributes:
        tags: the tags as text.
        token_ids: what the tokenizer makes of the end. Sampled ids may spell it otherwise.
        is_special: whether plain decoding, which skips special tokens, drops the tags.

    Raises:
        ValueError: for an empty `end_of_thinking`.
    """

    def __init__(self, tokenizer, end_of_thinking: str = END_OF_THINKING, opening: str | None = None):
        self.tokenizer = tokenizer
        self.tags = ThinkingTags(end_of_thinking, opening)
        self.token_ids = tokenizer.encode(end_of_thinking, add_special_tokens=False)
        own = tokenizer.encode(self.tags.opening, add_special_tokens=False) if self.tags.opening else []
        special, tags = special_ids(tokenizer), {*self.token_ids, *own}
        self._dropped = special - tags
        self.is_special = bool(special & tags)

    @property
    def in_vocabulary(self) -> bool:
        """Whether the tokenizer can write the end at all."""
        return bool(self.token_ids) and self.tokenizer.unk_token_id not in self.token_ids

    def ends(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Every end of thinking in the ids, in order: half-open ranges of the tokens that hold a character of it."""
        ids = [int(token) for token in ids]
        count = decoded(self.tokenizer, ids).count(self.tags.end)
        if not count:
            return []
        places = [place for place, token in enumerate(ids) if token == self.token_ids[0]]
        if len(self.token_ids) == 1 and len(places) == count:  # as nearly always where it is one token
            return [(place, place + 1) for place in places]
        text, spans = token_char_spans(self.tokenizer, ids)
        found = re.finditer(re.escape(self.tags.end), text)
        return [tokens_holding(spans, match.start(), match.end()) for match in found]

    def first_end(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Token range of the first end of thinking."""
        return next(iter(self.ends(ids)), None)

    def last_end(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Token range of the last end of thinking."""
        return next(reversed(self.ends(ids)), None)

    def state_of_prompt(self, prompt_ids: Sequence[int]) -> str:
        """`ThinkingTags.state_of_prompt` of a prompt's ids."""
        return self.tags.state_of_prompt(decoded(self.tokenizer, prompt_ids))

    def opened_by(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str | None:
        """Who opened the thinking: "prompt", "completion", or None for neither (or an unknown opening)."""
        if self.state_of_prompt(prompt_ids) == "opened":
            return "prompt"
        opening = self.tags.opening
        return "completion" if opening and opening in decoded(self.tokenizer, completion_ids) else None

    def count_tokens(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int:
        """Length of the thinking in completion tokens, its end included.

        Up to the first end of thinking; all tokens if thinking was opened and not ended; 0 if it was not opened.
        """
        end = self.first_end(completion_ids)
        if end is not None:
            return end[1]
        return len(completion_ids) if self.opened_by(prompt_ids, completion_ids) else 0

    def text(self, completion_ids: Sequence[int]) -> str:
        """Text to grade: special tokens left out, but for those of the thinking tags, which plain decoding drops."""
        return decoded(self.tokenizer, [token for token in map(int, completion_ids) if token not in self._dropped])

    def answer_text(self, completion_ids: Sequence[int]) -> str:
        """Text after the last end of thinking, or all of it, without special tokens."""
        return self.tags.answer_text(self.text(completion_ids))


def special_ids(tokenizer) -> set[int]:
    """Ids that decoding leaves out where special tokens are skipped."""
    added = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    return added | set(tokenizer.all_special_ids)


def tokens_holding(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Half-open range of the tokens that hold a character of [start, end), by the spans of `token_char_spans`."""
    # Starts and ends never decrease, so both edges are found by bisection.
    return bisect_left(spans, start + 1, key=lambda span: span[1]), bisect_left(spans, end, key=lambda span: span[0])


def answer_start(text: str, answer: str) -> int | None:
    r"""Where the answer of a completion without thinking tags begins; what stands before it is the thinking.

    Experimental: no paper describes it. Linear in the length of the text.

    Args:
        text: the completion.
        answer: "last_boxed", the last `\boxed{}` that is closed and filled, or "last_paragraph", the last text behind
            a blank line (the whole text where there is none).

    Returns:
        An offset into the text; None where there is no such answer.

    Raises:
        ValueError: for another `answer`.
    """
    if answer == "last_boxed":
        return _last_box(text)
    if answer == "last_paragraph":
        end = len(text.rstrip())
        breaks = [match.end() for match in _PARAGRAPH_BREAK.finditer(text, 0, end)]
        return breaks[-1] if breaks else 0 if end else None
    raise ValueError(f"answer={answer!r} names no place in a text without tags; set it to one of {ANSWERS[1:]}.")


def _last_box(text: str) -> int | None:
    r"""Offset of the command of the last closed, filled `\boxed{}`."""
    open_braces: list[tuple[int, int] | None] = []  # start of the command and of the content; None: a brace of its own
    last = None
    for match in _BOX_OR_BRACE.finditer(text):
        if match["box"]:
            open_braces.append(match.span())
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened and _FILLED.search(text, opened[1], match.start()):
                last = opened[0] if last is None else max(last, opened[0])
    return last


def check_answer(answer: str) -> None:
    """Raise a ValueError unless `answer` is one of `ANSWERS`."""
    if answer not in ANSWERS:
        raise ValueError(f"answer={answer!r} is unknown; set it to one of {', '.join(ANSWERS)}.")
