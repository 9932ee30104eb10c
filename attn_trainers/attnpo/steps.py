"""Reasoning steps of a thinking text.

AttnPO (arXiv 2602.09953) cuts the thinking of a response at phrases that open a new step, in three classes: turns
("Wait", "Alternatively"), forward moves ("Now", "Let me") and summaries ("So", "Therefore"); `**Final Answer` is a
step of its own. Turns cut anywhere, forward moves and summaries at the start of a line only. Steps shorter than
`min_step_chars` are then merged into a neighbour.

Two rule sets share that procedure. `compat=True` cuts as the published program does, to the character. The default
mends four of its faults:

1. A missing comma joins "No," and "Let me double-check" into one phrase that no text contains. Here they are two.
2. No word boundary is demanded, so "But" cuts "Butter" and "So" cuts "Solution". Here a phrase that ends in a letter
   must end a word. No boundary is demanded before it: a capital glued to the word before ("doneWait") is a missing
   space.
3. A short summary after `**Final Answer` is merged into it. Here nothing is ever merged with a final step.
4. A short step before a turn goes to its left neighbour, so that the turn keeps its beginning; but the published rule
   overlooks a turn that is the last step, and leaves a short first step alone. Here the rule holds for the last turn
   too, and a step without a left neighbour goes right. Blank text before the first phrase is no step: it joins the
   phrase's.

The kind of an opening step without a turn is "forward" in both: nothing precedes it that it could summarise.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from ..base.options import require_choice
from ..thinking import END_OF_THINKING


STEP_MODES = ("phrases", "paragraphs")


@dataclass
class Step:
    """One step of a thinking text.

    Attributes:
        start: offset of its first character.
        end: offset after its last character.
        kind: "turn", "forward", "summary" or "final"; "paragraph" from `split_paragraphs`.
    """

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class ReasoningPhrases:
    """The phrases that open a step, case-sensitive; the default is the set for English reasoning models.

    Attributes:
        turn: phrases that reconsider or branch off; they cut anywhere.
        forward: phrases that go on; they cut at the start of a line.
        summary: phrases that conclude; they cut at the start of a line.
        final: phrases that open the closing answer; they cut anywhere, and their steps are never merged.
        whole_words: demand that a phrase ending in a letter ends a word. False for scripts without word spaces.
    """

    turn: tuple[str, ...]
    forward: tuple[str, ...]
    summary: tuple[str, ...]
    final: tuple[str, ...] = ("**Final Answer",)
    whole_words: bool = True

    def __post_init__(self):
        seen: dict[str, str] = {}
        for kind in ("turn", "forward", "summary", "final"):
            phrases = getattr(self, kind)
            if not isinstance(phrases, tuple) or not all(isinstance(phrase, str) and phrase for phrase in phrases):
                raise ValueError(f"phrases.{kind}={phrases!r} must be a tuple of non-empty strings")
            for phrase in phrases:
                if seen.setdefault(phrase, kind) != kind:
                    raise ValueError(f"phrase {phrase!r} is both {seen[phrase]!r} and {kind!r}: keep it in one class")
        if not seen:
            raise ValueError("phrases are empty: give at least one phrase in turn, forward, summary or final")
        if not isinstance(self.whole_words, bool):
            raise ValueError(f"phrases.whole_words={self.whole_words!r} must be true or false")

    @classmethod
    def from_file(cls, path: str | Path) -> "ReasoningPhrases":
        """Read a JSON object with the lists "turn", "forward", "summary" and optionally "final" and "whole_words".

        Raises:
            ValueError: A field is missing, unknown or not a list of strings.
        """
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or not {"turn", "forward", "summary"} <= set(record) <= known:
            raise ValueError(
                f"{path}: expected a JSON object with the fields turn, forward, summary (final, whole_words)"
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


def _checks(*verbs: str) -> tuple[str, ...]:
    """Every way of announcing a check that the phrase list knows, for each verb."""
    openings = ("Let me", "Let me just", "Let's", "Let's just", "Just to")
    return tuple(f"{opening} {verb}" for verb in verbs for opening in openings)


_DOUBTS = (
    ("Wait", "But", "However", "Hold on", "Looking back", "I don't see any errors")
    + tuple(f"Hmm, {rest}" for rest in ("wait", "no", "but", "just"))
    + tuple(f"Hmm, let me {rest}" for rest in ("double-check", "verify", "make sure", "check"))
    + ("So, is", "Is it", "Is that right?", "Is there", "Right?")
    + ("Let me make sure", "Let me just make sure", "Let's make sure", "Just to make sure")
    + _checks("verify", "confirm", "check", "recap")
)
_BRANCHES = (
    ("Alternatively", "Another approach", "Another way", "Another idea", "Another thought")
    + ("I guess another way", "I guess another approach", "Let me just think if there")
)  # fmt: skip
_FORWARD = (
    ("Let me", "Let's", "I ", "We ", "Okay", "Hmm", "Now", "Alright", "First,", "First off,", "Second,", "Third,")
    + ("Starting", "Then", "Next", "Finally", "Similarly", "Again", "In this case", "Because", "Given that")
    + ("The problem gives", "To ", "Since")
)  # fmt: skip
_SUMMARY = ("So", "Therefore", "Thus", "Hence", "Hmm, so", "Okay, so", "Putting it all together")

ENGLISH_PHRASES = ReasoningPhrases(_DOUBTS + ("No,",) + _checks("double-check") + _BRANCHES, _FORWARD, _SUMMARY)
# The published list lacks a comma after "No,": that phrase and the one after it run into one.
_PUBLISHED_CHECKS = tuple(phrase for phrase in _checks("double-check") if phrase != "Let me double-check")
PUBLISHED_PHRASES = ReasoningPhrases(
    _DOUBTS + ("No,Let me double-check",) + _PUBLISHED_CHECKS + _BRANCHES, _FORWARD, _SUMMARY, whole_words=False
)


@dataclass
class _Segment:
    start: int
    end: int
    kind: str
    phrase_chars: int  # length of the phrase that opens it, 0 without one

    @property
    def length(self) -> int:
        return self.end - self.start


# (segment, kind of left neighbour, kind of right neighbour, right is the last) -> sides to try, in order
_MergeRule = Callable[[_Segment, str | None, str | None, bool, int], tuple[str, ...]]


def split_reasoning(
    text: str,
    *,
    min_step_chars: int = 80,
    min_rest_chars: int = 15,
    compat: bool = False,
    phrases: ReasoningPhrases | None = None,
) -> list[Step]:
    """Cut a thinking text into reasoning steps (AttnPO, arXiv 2602.09953, segmentation of its published code).

    Linear in the length of the text. A short step stays where it has no neighbour to go to: a turn that is the last
    step, or a step beside a final one.

    Args:
        text: the thinking text. Anything from the first `</think>` on is left out.
        min_step_chars: steps with fewer characters are merged into a neighbour.
        min_rest_chars: A short summary with at most this many characters after its phrase belongs to what follows.
        compat: cut exactly as the published program does, faults included.
        phrases: phrases for another language or model family; default `ENGLISH_PHRASES`.

    Returns:
        Steps in order that partition the thinking text: the first starts at 0, each next where the one before ends.
        Empty for an empty text. With fewer than two steps a response is not to be rescaled.

    Raises:
        ValueError: A negative length, or `phrases` together with `compat`.
    """
    splitter = Splitter("phrases", min_step_chars, min_rest_chars, compat, phrases)
    return splitter(text.split(END_OF_THINKING, 1)[0])


def split_paragraphs(text: str) -> list[Step]:
    """Cut a thinking text into its paragraphs, for models whose thinking uses none of the phrases.

    A paragraph ends at one or more blank lines, which belong to it; blank text at the beginning belongs to the first.

    Args:
        text: the thinking text. Anything from the first `</think>` on is left out.

    Returns:
        Steps of kind "paragraph" that partition the thinking text; empty for an empty text.
    """
    return _paragraphs(text.split(END_OF_THINKING, 1)[0])


def _paragraphs(thinking: str) -> list[Step]:
    if not thinking:
        return []
    first = len(thinking) - len(thinking.lstrip())
    ends = (match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", thinking))
    cuts = [0, *(end for end in ends if first < end < len(thinking)), len(thinking)]
    return [Step(start, end, "paragraph") for start, end in zip(cuts[:-1], cuts[1:], strict=True)]


@dataclass(frozen=True)
class Splitter:
    """Cuts thinking texts into steps, one way for a whole run; called with a text, it returns its steps.

    Attributes:
        mode: "phrases" (`split_reasoning`) or "paragraphs" (`split_paragraphs`).
        min_step_chars, min_rest_chars, compat, phrases: as for `split_reasoning`.
    """

    mode: str = "phrases"
    min_step_chars: int = 80
    min_rest_chars: int = 15
    compat: bool = False
    phrases: ReasoningPhrases | None = None

    def __post_init__(self):
        require_choice("step_mode", self.mode, STEP_MODES)
        for name in ("min_step_chars", "min_rest_chars"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 merges nothing.")
        if self.compat and self.phrases is not None:
            raise ValueError("phrases are given, but compat=True fixes the published set; drop one of them.")

    @classmethod
    def of(cls, step_mode: str, phrases_file: str | None = None, **options) -> "Splitter":
        """A splitter by the names of the settings; the phrases are read from a file where one is given."""
        return cls(step_mode, phrases=ReasoningPhrases.from_file(phrases_file) if phrases_file else None, **options)

    def __call__(self, text: str) -> list[Step]:
        """Steps of a thinking text, all of it."""
        if self.mode == "paragraphs":
            return _paragraphs(text)
        if not text:
            return []
        phrases = PUBLISHED_PHRASES if self.compat else self.phrases or ENGLISH_PHRASES
        segments = _cut(text, phrases, join_blank_lead=not self.compat)
        sides = _published_merge_sides if self.compat else _merge_sides
        segments = _merge_short(segments, self.min_step_chars, self.min_rest_chars, sides)
        return [Step(segment.start, segment.end, segment.kind) for segment in segments]

    def phrase_counts(self, text: str) -> dict[str, int]:
        """How often a thinking text opens a step with a phrase of each kind, before short steps are merged; empty
        where steps are paragraphs."""
        if self.mode != "phrases":
            return {}
        counts = dict.fromkeys(("turn", "forward", "summary", "final"), 0)
        for segment in _cut(text, self.phrases or ENGLISH_PHRASES, join_blank_lead=True) if text else ():
            counts[segment.kind] += segment.phrase_chars > 0
        return counts


@lru_cache(maxsize=16)
def _phrase_pattern(phrases: ReasoningPhrases) -> tuple[re.Pattern, dict[str, str]]:
    kind_of = {phrase: kind for kind in ("turn", "forward", "summary", "final") for phrase in getattr(phrases, kind)}
    # The longest phrase wins where several match: alternatives are tried in order.
    longest_first = sorted(kind_of, key=len, reverse=True)
    boundary = [r"(?!\w)" if phrases.whole_words and phrase[-1].isalpha() else "" for phrase in longest_first]
    alternatives = (re.escape(phrase) + end for phrase, end in zip(longest_first, boundary, strict=True))
    return re.compile("|".join(alternatives)), kind_of


def _cut(thinking: str, phrases: ReasoningPhrases, *, join_blank_lead: bool) -> list[_Segment]:
    pattern, kind_of = _phrase_pattern(phrases)
    openings = []  # (start, kind, phrase_chars)
    for match in pattern.finditer(thinking):
        kind, start = kind_of[match.group()], match.start()
        if kind in ("turn", "final") or (start > 0 and thinking[start - 1] == "\n"):
            openings.append((start, kind, match.end() - start))
    if not openings or openings[0][0] > 0:
        lead = (0, "forward", 0)
        if join_blank_lead and openings and not thinking[: openings[0][0]].strip():
            start, kind, phrase_chars = openings.pop(0)
            if kind in ("turn", "final"):
                lead = (0, kind, start + phrase_chars)
        openings.insert(0, lead)
    ends = [start for start, _, _ in openings[1:]] + [len(thinking)]
    return [
        _Segment(start, end, kind, phrase_chars)
        for (start, kind, phrase_chars), end in zip(openings, ends, strict=True)
    ]


def _merge_short(segments: list[_Segment], min_chars: int, min_rest: int, sides: _MergeRule) -> list[_Segment]:
    """Merge short segments into neighbours from left to right; a merged one keeps the left part's start and kind.

    What a merge leaves is looked at again. Each step either merges or moves on, so the time is linear.
    """
    done: list[_Segment] = []
    current, following = segments[0], 1
    while True:
        side = None
        if current.length < min_chars and current.kind != "final":
            left = done[-1].kind if done else None
            right = segments[following].kind if following < len(segments) else None
            side = next(iter(sides(current, left, right, following == len(segments) - 1, min_rest)), None)
        if side == "right":
            current.end = segments[following].end
            following += 1
        elif side == "left":
            done[-1].end = current.end
            current = done.pop()
        else:
            done.append(current)
            if following == len(segments):
                return done
            current = segments[following]
            following += 1


def _merge_sides(segment: _Segment, left: str | None, right: str | None, right_is_last: bool, min_rest: int):
    """Sides a short segment may go to, best first: neither a missing neighbour nor a final one."""
    if segment.kind == "turn":
        order = ("right",)
    elif right == "turn":
        order = ("left", "right")
    elif segment.kind == "forward":
        order = ("right",)
    elif segment.length - segment.phrase_chars <= min_rest:
        order = ("right", "left")
    else:
        order = ("left", "right")
    free = {"left": left not in (None, "final"), "right": right not in (None, "final")}
    return tuple(side for side in order if free[side])


def _published_merge_sides(segment: _Segment, left: str | None, right: str | None, right_is_last: bool, min_rest: int):
    """The same in the published program, which merges into a final left neighbour and overlooks a last turn."""
    right_free = right not in (None, "final")
    to_left = ("left",) if left is not None else ()
    if segment.kind == "turn":
        return ("right",) if right_free else ()
    if right == "turn" and not right_is_last:
        return to_left
    if segment.kind == "forward":
        return ("right",) if right_free else ()
    if segment.length - segment.phrase_chars <= min_rest and right_free:
        return ("right",)
    return to_left
