"""End of thinking in ids and text, and where an answer without tags begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.thinking import EndOfThinking, ThinkingTags, answer_start
from attn_trainers.tiny.byte_model import build_byte_tokenizer
from tests.token_helpers import byte_tokenizer, ids_of, piece_tokenizer


BYTES = byte_tokenizer(256, special_end=False)
PIECES = piece_tokenizer("a", "b", "</think>", "<think>", "\n", "</", "think", ">", ">\n\n", "b</", "<", "think>\n")


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        (["a", "</think>", "b"], [(1, 2)]),
        (["a", "</", "think", ">", "b"], [(1, 4)]),
        (["a", "</", "think", ">\n\n", "b"], [(1, 4)]),  # it ends inside a token
        (["a", "b</", "think", ">", "b"], [(1, 4)]),  # and begins inside one
        (["</think>", "a", "</", "think", ">", "</think>"], [(0, 1), (2, 5), (5, 6)]),
        (["a", "</", "think", "b"], []),
        ([], []),
    ],
)
def test_ends_in_ids(pieces, ends):
    end, ids = EndOfThinking(PIECES), ids_of(PIECES, *pieces)
    assert end.token_ids == ids_of(PIECES, "</think>")
    assert end.ends(ids) == ends
    assert end.first_end(ids) == (ends[0] if ends else None)
    assert end.last_end(ids) == (ends[-1] if ends else None)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(st.text(st.sampled_from("a<🙂答/\n"), max_size=6), min_size=1, max_size=4))
@pytest.mark.parametrize("tag", ["</think>", "[/THINK]"])
def test_ends_are_where_the_bytes_of_the_text_are(tag, parts):
    end = EndOfThinking(BYTES, tag)
    expected, offset = [], 0
    for part in parts[:-1]:
        offset += len(part.encode())
        expected.append((offset, offset + len(tag)))
        offset += len(tag)
    assert end.ends(BYTES.encode(tag.join(parts))) == expected


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("tag", ["</think>", "</seed:think>", "[/THINK]"])
def test_graded_text_keeps_the_tags_and_drops_other_special_tokens(tag, special):
    tokenizer = build_byte_tokenizer()
    opening = tag.replace("/", "")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [opening, tag]})
    end = EndOfThinking(tokenizer, tag)
    ids = tokenizer.encode(f"{opening}Perhaps 7.{tag}It is 12.<|endoftext|>")
    assert end.text(ids) == f"{opening}Perhaps 7.{tag}It is 12."
    assert end.answer_text(ids) == "It is 12."
    assert (tag in tokenizer.decode(ids, skip_special_tokens=True)) != special
    length = len(tokenizer.encode(f"{opening}Perhaps 7.{tag}"))
    assert end.count_tokens([], ids) == length == end.last_end(ids)[1]
    assert end.in_vocabulary


def test_a_text_that_the_tokenizer_cannot_write_is_found_nowhere():
    end = EndOfThinking(piece_tokenizer("a"), "</think>")
    assert not end.in_vocabulary
    assert end.ends([1, 0, 1]) == []


@pytest.mark.parametrize(
    ("prompt", "completion", "opened_by", "length"),
    [
        ("", "ab</think>c", None, 3),
        ("<think>\n", "abc", "prompt", 3),
        ("<think>\n", "ab</think>c", "prompt", 3),
        ("", "<think>ab", "completion", 3),
        ("", "<think>ab</think>c", "completion", 4),
        ("", "abc", None, 0),
        ("<think>\n\n</think>\n\n", "abc", None, 0),  # a template that asks not to think
        ("Write <think> first.", "abc", None, 0),  # a prompt that speaks of the tag
        ("", "a</think>b</think>", None, 2),
    ],
)
def test_length_of_the_thinking(prompt, completion, opened_by, length):
    tokenizer = build_byte_tokenizer()  # a tag is one token, any other character here too
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(completion)
    end = EndOfThinking(tokenizer)
    assert end.count_tokens(prompt_ids, ids) == length
    assert end.opened_by(prompt_ids, ids) == opened_by


def test_length_where_the_end_is_merged_with_what_follows():
    end = EndOfThinking(PIECES)
    assert end.count_tokens([], ids_of(PIECES, "a", "</", "think", ">\n\n", "b")) == 4
    assert end.count_tokens(ids_of(PIECES, "a", "<", "think>\n"), ids_of(PIECES, "a", "b")) == 2


@pytest.mark.parametrize(
    ("text", "once", "answer"),
    [
        ("a</think>b", True, "b"),
        (" <think>a</think>b", True, "b"),
        ("a<think>b</think>c", False, "c"),
        ("<think>a<think>b</think>c", False, "c"),
        ("a</think>b<think>", False, "b<think>"),
        ("a</think>b</think>c", False, "c"),
        ("ab", False, "ab"),
        ("", False, ""),
    ],
)
def test_text_that_closes_its_thinking_once(text, once, answer):
    tags = ThinkingTags()
    assert tags.closes_once(text) == once
    assert tags.answer_text(text) == answer


def test_opening_by_the_end():
    openings = {end: ThinkingTags(end).opening for end in ("</think>", "[/THINK]", "◁/think▷", "<|end_of_thought|>")}
    assert openings == {
        "</think>": "<think>",
        "[/THINK]": "[THINK]",
        "◁/think▷": "◁think▷",
        "<|end_of_thought|>": None,
    }
    tags = ThinkingTags("<|end_of_thought|>", "<|begin_of_thought|>")
    assert tags.state_of_prompt("1 + 1<|begin_of_thought|>\n") == "opened"
    assert tags.state_of_prompt("1 + 1<|begin_of_thought|>\n<|end_of_thought|>\n") == "closed"
    assert ThinkingTags("<|end_of_thought|>").state_of_prompt("<|begin_of_thought|>") == "none"
    with pytest.raises(ValueError, match="end_of_thinking='' is empty"):
        ThinkingTags("")


@pytest.mark.parametrize(
    ("text", "boxed", "paragraph"),
    [
        (r"a \boxed{1} b \boxed{2} c", 14, 0),
        (r"a \boxed{\frac{1}{2}}", 2, 0),
        (r"a \fbox {1}", 2, 0),
        (r"a \boxed{1} \boxed{ } \boxed{2", 2, 0),
        (r"{a \boxed{1}", 3, 0),
        (r"\\boxed{1}", None, 0),  # a line break, then text
        (r"\boxed{\} 1}", 0, 0),
        ("a\n\nb\n \n\n c \n\n", None, 9),
        ("\n\na\nb", None, 2),
        (" \n\n ", None, None),
        ("", None, None),
    ],
)
def test_answers_without_tags(text, boxed, paragraph):
    assert answer_start(text, "last_boxed") == boxed
    assert answer_start(text, "last_paragraph") == paragraph


def test_an_answer_needs_a_known_place():
    with pytest.raises(ValueError, match="answer='tag' names no place"):
        answer_start("a", "tag")
