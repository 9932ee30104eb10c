"""Steps on the tokens that were sampled: a step is found in the text and used on tokens."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..thinking import END_OF_THINKING, ThinkingTags, answer_start, special_ids, tokens_holding
from ..token_spans import token_char_spans
from .steps import Step


@dataclass
class StepAlignment:
    """Token ranges of a completion's reasoning steps.

    Attributes:
        step_ranges: half-open (start, end) token ranges, relative to the completion. They are contiguous, start at 0
            (behind the opening of the thinking, where the completion wrote one) and end where the end of thinking (or,
            without tags, the answer) begins; empty when `reason` is set.
        kinds: kind of each step.
        texts: text of each step; together they are the thinking text.
        answer_start: first token of the answer, which runs from there to the end of the completion, its
            end-of-sequence token included. None without a unique end of thinking, or without an answer to be found.
        reason: why the completion has no usable steps, or None: "no_end_of_thinking", "several_end_of_thinking",
            "no_answer" (nothing after the end of thinking; without tags: no place where an answer begins),
            "too_few_steps" (fewer than two).
    """

    step_ranges: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answer_start: int | None = None
    reason: str | None = None


def reasoning_step_ranges(
    tokenizer,
    completion_ids: Sequence[int],
    *,
    splitter: Callable[[str], list[Step]],
    end_of_thinking: str = END_OF_THINKING,
    answer: str = "tag",
) -> StepAlignment:
    r"""Token ranges of the reasoning steps of one sampled completion.

    A token belongs to the step that holds its first character that is no white space (its first character if it has no
    other), since tokens carry the space before their word. Every token of the thinking is in exactly one step; a token
    that holds any character of the end of thinking is in none, nor is one that holds any of an opening that the
    completion begins with. A step that gets no token is merged into its neighbour.

    Args:
        tokenizer: the tokenizer that the ids belong to.
        completion_ids: (n,) sampled ids without padding.
        splitter: cuts the thinking text into steps that partition it, e.g. `split_reasoning`.
        end_of_thinking: the text that ends the thinking, of one token or several.
        answer: where the answer begins. "tag": after `end_of_thinking`. Experimental, for models that write no tags:
            "last_boxed", at the last `\boxed{}`, or "last_paragraph"; all before it is the thinking.

    Returns:
        The ranges, or none and the reason.

    Raises:
        ValueError: for an unknown `answer`.
    """
    text, spans = token_char_spans(tokenizer, completion_ids)
    tags = ThinkingTags(end_of_thinking)
    begin = tags.body_start(text)
    if answer == "tag":
        marker = text.find(tags.end, begin)
        if marker < 0:
            return StepAlignment(reason="no_end_of_thinking")
        marker_end = marker + len(tags.end)
        if text.find(tags.end, marker_end) >= 0:
            return StepAlignment(reason="several_end_of_thinking")
        thinking_end, answer_token = tokens_holding(spans, marker, marker_end)
    else:
        marker = answer_start(text[: _written_end(tokenizer, completion_ids, spans)], answer)
        if marker is None:
            return StepAlignment(reason="no_answer")
        # A token that holds the first character of the answer is the answer's.
        thinking_end = answer_token = tokens_holding(spans, marker, marker)[0]
    if answer_token == len(spans):
        return StepAlignment(answer_start=answer_token, reason="no_answer")

    thinking = text[:marker]
    first = bisect_left(spans, begin, key=lambda span: span[0]) if begin else 0
    anchors = [_anchor(thinking, start, end) - begin for start, end in spans[first:thinking_end]]
    ranges, kinds, texts = _token_ranges(splitter(thinking[begin:]), thinking[begin:], anchors)
    if len(ranges) < 2:
        return StepAlignment(answer_start=answer_token, reason="too_few_steps")
    return StepAlignment([(first + start, first + end) for start, end in ranges], kinds, texts, answer_token)


def exclusion_warning(
    reasons: Sequence[str | None], texts: Sequence[str] = (), *, end_of_thinking: str, answer: str
) -> str | None:
    r"""What to tell the user where more than half of a batch's responses have no usable steps; None otherwise.

    Args:
        reasons: `StepAlignment.reason` of each response.
        texts: the responses; what they hold decides which setting is advised. May be left out.
        end_of_thinking: the setting.
        answer: the setting.
    """
    counts = Counter(reason for reason in reasons if reason is not None)
    excluded = counts.total()
    if 2 * excluded <= len(reasons):
        return None
    reason, count = counts.most_common(1)[0]
    boxed = sum(answer_start(text, "last_boxed") is not None for text in texts)
    if reason == "no_end_of_thinking":
        without_tags = (
            f'answer="last_boxed" ({boxed} of {len(texts)} hold a \\boxed{{}})'
            if 2 * boxed > len(texts)
            else 'answer="last_paragraph", or "last_boxed" with a prompt that asks for \\boxed{}'
        )
        advice = (
            f"end_of_thinking={end_of_thinking!r} is not in them. If the model ends its thinking otherwise, set "
            f"end_of_thinking to that text; if it writes no thinking tags, set {without_tags}; if the responses are "
            "cut off, raise max_completion_length."
        )
    elif reason == "several_end_of_thinking":
        advice = (
            f"end_of_thinking={end_of_thinking!r} is in them more than once. Set end_of_thinking to a text that "
            "stands once in a response."
        )
    elif reason == "no_answer" and answer == "last_boxed":
        advice = (
            'they hold no closed \\boxed{}. Ask for one in the prompt, set answer="last_paragraph", or raise '
            "max_completion_length if they are cut off."
        )
    elif reason == "no_answer":
        advice = "nothing follows the thinking. Raise max_completion_length if the responses are cut off."
    else:
        advice = (
            'their thinking is one step. Set step_mode="paragraphs" if the model uses none of the phrases that open a '
            "step, or lower min_step_chars."
        )
    return f"{excluded} of {len(reasons)} responses get no step credit, {count} for {reason}: {advice}"


def _written_end(tokenizer, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> int:
    """Offset of the end of the text, less the special tokens (end of sequence) that it ends with."""
    special, last = special_ids(tokenizer), len(ids)
    while last and int(ids[last - 1]) in special:
        last -= 1
    return spans[last - 1][1] if last else 0


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
