r"""What a completion answers: the text that counts, its `\boxed{}` or what it states, a choice's label and value."""

import re

from ..thinking import END_OF_THINKING, ThinkingTags


_BOX_OR_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*)(?:\{|(?P<number>-?[0-9](?:[0-9.,/]*[0-9])?))|\\.|[{}]", re.DOTALL
)
_BETWEEN_BOXES = re.compile(r"[\s$,;.()\[\]\\]*(?:\\text\{\s*)?(?:and|or)?(?:\s*\})?[\s$,;.()\[\]\\]*")
_FILLED = re.compile(r"\S")
_MAX_ANSWER_CHARS = 4_000  # a longer answer is no answer
_MAX_BETWEEN_BOXES = 40
_MAX_BOXES = 16


def answered(completion: str, end_of_thinking: str = END_OF_THINKING) -> list[str]:
    """The texts of which one has to be right: the box or boxes after the thinking, or what is stated without any."""
    text = ThinkingTags(end_of_thinking).answer_text(completion)
    boxes = boxed_answers(text)
    if boxes is None:
        whole = text.strip()
        return [*([whole] if len(whole) <= _MAX_ANSWER_CHARS else []), *stated_answers(whole)]
    answers = [boxes[-1], ", ".join(boxes)] if len(boxes) > 1 else boxes
    return [answer for answer in answers if len(answer) <= _MAX_ANSWER_CHARS]


def boxed_answers(text: str) -> list[str] | None:
    r"""Contents of the last closed `\boxed{}` and of those right before it ("`\boxed{2}` and `\boxed{3}`"), in order.

    Passed over: empty boxes, as in a repeated instruction, and one that the length limit cut off. None: there is no
    box. []: none is closed and filled. Linear in the length of the text.
    """
    spans = _closed_boxes(text)
    if not spans:
        return None if spans is None else []
    boxes: list[str] = []
    following = len(text)  # where the box after this one starts
    for start, content_start, end in reversed(spans):
        between = text[end:following].removeprefix("}")
        if boxes and (end >= following or len(between) > _MAX_BETWEEN_BOXES or not _BETWEEN_BOXES.fullmatch(between)):
            break
        boxes.insert(0, text[content_start:end].strip())
        following = start
        if len(boxes) == _MAX_BOXES:
            break
    return boxes


def _closed_boxes(text: str) -> list[tuple[int, int, int]] | None:
    """(start of the command, start and end of the content) of every closed, filled box by its start; None: no box."""
    spans, open_braces, seen = [], [], False
    for match in _BOX_OR_BRACE.finditer(text):
        is_box, number = match["box"], match["number"]
        seen |= bool(is_box)
        if number:
            spans.append((match.start(), match.start("number"), match.end()))
        elif match[0].endswith("{") and (is_box or match[0] == "{"):
            open_braces.append((match.start(), match.end()) if is_box else None)
        elif match[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened and _FILLED.search(text, opened[1], match.start()):
                spans.append((*opened, match.start()))
    return sorted(spans) if seen else None


# Answers that are not boxed --------------------------------------------------------------------------

_TAIL_CHARS = 6_000  # of an answer that is not boxed, this much is searched
_STATED_CHARS = 400
_CUE = re.compile(
    r"####|(?:\banswers?\b[^.\n:=]{0,60}?(?:\bis\b|\bare\b|[:=])|\b(?:option|choice) is\b|答案[是为為:：]+)[ \t*_:]*",
    re.IGNORECASE,
)
_BEFORE_NO_ANSWER = re.compile(
    r"\b(?:not|never|no|between|least|most|than|minus|negative|except|without|step|case)\s*[$(\\]*\s*$|n't\s*[$(\\]*\s*$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|(?<=[^\s.])\.(?=\s|\*|$)|[!?](?=\s|$)(?<![0-9)]!)|。")
_ENVIRONMENT = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)
_DIGIT = re.compile(r"[0-9]|[^\x00-\x7f]")  # or a character that may stand for one
_LEADING = re.compile(r"(?:[\s,;:]|[aAI](?=\s))*")
_MARKUP = re.compile(r"\*\*|__|`|^#+|^[-*>]\s")
_WORDS = re.compile(
    r"(?<![\\A-Za-z{])(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|and|or)(?![A-Za-z]))[A-Za-z][A-Za-z'-]*[A-Za-z](?![A-Za-z])"
)


def stated_answers(text: str) -> list[str]:
    """What a text without a box may state as its answer, each to be read whole or not at all.

    The sentence after the last "answer" (or `####`), otherwise the last sentence; and the last piece of mathematics
    in it, with the words that follow it.
    """
    text = text[-_TAIL_CHARS:].strip()
    cues = [match for match in _CUE.finditer(text) if text[match.end() :].strip(" \n*_.:$")]
    rest = text[cues[-1].end() :] if cues else text
    sentences = [sentence.strip() for sentence in _split_sentences(rest)]
    sentences = [sentence for sentence in sentences if sentence.strip(" *_`$.")]
    if not sentences:
        return []
    sentence = _MARKUP.sub("", sentences[0] if cues else sentences[-1]).strip()
    candidates = [sentence, *_last_mathematics(sentence)]
    return [candidate for candidate in dict.fromkeys(candidates) if candidate and len(candidate) <= _STATED_CHARS]


def _split_sentences(text: str) -> list[str]:
    """Sentences and lines, where what stands in a mathematical environment is not torn apart."""
    protected = _ENVIRONMENT.sub(lambda match: match[0].replace("\n", " "), text)
    return _SENTENCE_END.split(protected)


def _last_mathematics(sentence: str) -> list[str]:
    """The last environment or piece between words that holds a digit, with all that follows; [] for "not 5"."""
    environments = list(_ENVIRONMENT.finditer(sentence))
    if environments:
        last = environments[-1]
        start, found = last.start(), next(group for group in last.groups() if group) + sentence[last.end() :]
    else:
        words = [(0, 0), *(match.span() for match in _WORDS.finditer(sentence))]
        ends = [start for start, _ in words[1:]] + [len(sentence)]
        pieces = [(start, end) for (_, start), end in zip(words, ends, strict=True)]
        filled = [piece for piece in pieces if _DIGIT.search(sentence, *piece)]
        if not filled:
            return []
        start = _LEADING.match(sentence, filled[-1][0]).end()
        found = sentence[start:]
    return [] if _BEFORE_NO_ANSWER.search(sentence[:start]) else [found]


# Choices ---------------------------------------------------------------------------------------------

_CALLED = re.compile(r"^\s*(\\(?:text|textbf|textrm|mathrm)\s*\{\s*)?(?:option|choice)[\s~]+", re.IGNORECASE)
_TEXT_BRACES = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|bf|rm)\s*\{|\}|\s")
_LABEL = re.compile(r"\(([A-Ja-j])\)|([A-J])[.)]?")
_LABEL_IN_FRONT = re.compile(
    r"\s*(?:\\(?:text|textbf|textrm|mathrm|mathbf|bf|rm)\s*\{\s*)?"
    r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):](?=[\s}\\]))"
    r"(?:\s|\\[,;: ]|\\q?quad(?![A-Za-z])|~)*(?P<close>\}?)[\s.:~]*(?:\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)*"
)
_NO_VALUE = re.compile(
    r"[-+]\s|[*/^_=<>!,;|&)\]}.:']|\\(?:cup|cap|times|cdot|le|ge|in|ne|to|setminus)(?![A-Za-z])|\(\s*[A-J]\s*\)"
)


def choice(answer: str) -> tuple[str | None, str | None]:
    r"""(label, value) of a choice: ("B", "12") of `\textbf{(B)}\ 12`, ("B", None) of "(B)", else (None, answer)."""
    answer = _CALLED.sub(r"\1", answer)
    if match := _LABEL.fullmatch(_TEXT_BRACES.sub("", answer).strip("\\ .:~*$")):
        return (match[1] or match[2]).upper(), None
    match = _LABEL_IN_FRONT.match(answer)
    if not match:
        return None, answer
    value = answer[match.end() :].strip()
    opened = match[0].count("{") - match[0].count("}")
    if opened and value.endswith("}"):  # the value stands in the braces of the label
        value = value.removesuffix("}").strip()
    if not value or _NO_VALUE.match(value):
        return None, answer
    return match[1] or match[2], value
