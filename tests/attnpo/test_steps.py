"""Segmentation of thinking texts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnpo.steps import (
    ENGLISH_PHRASES,
    PUBLISHED_PHRASES,
    ReasoningPhrases,
    Splitter,
    split_paragraphs,
    split_reasoning,
)


PAD = "x " * 50  # 100 characters without a phrase


def cuts(text, **options):
    return [(step.start, step.end, step.kind) for step in split_reasoning(text, **options)]


def test_published_segmentation_to_the_character(shared_dir):
    cases = json.loads((shared_dir / "golden" / "attnpo_steps_compat.json").read_text())["cases"]
    assert len(cases) == 43
    for case in cases:
        expected = [(step["start"], step["end"], step["kind"]) for step in case["steps"]]
        assert cuts(case["text"], compat=True) == expected, case["source"]


FULL = (
    f"Okay, so I need to compute. {PAD}\nSo the answer is 3. {PAD}\nWait, check. {PAD}No, that is wrong. {PAD}"
    "\nTherefore 5. " + PAD + "\n**Final Answer**\n5\n"
)


@pytest.mark.parametrize("after", ["", "</think>", "</think>\nWait, more. " + PAD])
def test_golden_steps(after):
    first, last = [(0, 129, "forward"), (129, 250, "summary")], [(483, 597, "summary"), (597, 616, "final")]
    assert cuts(FULL + after, compat=True) == first + [(250, 483, "turn")] + last
    assert cuts(FULL + after) == first + [(250, 363, "turn"), (363, 483, "turn")] + last


def test_phrases_end_words():
    text = f"\n{PAD}\nWait, a. {PAD}Waiting for Butter. {PAD}"
    assert cuts(text, compat=True) == [(0, 102, "forward"), (102, 211, "turn"), (211, 331, "turn")]
    assert cuts(text) == [(0, 102, "forward"), (102, 331, "turn")]
    assert cuts(f"{PAD}\nSolution {PAD}") == [(0, 210, "forward")]
    assert cuts(f"{PAD}\nSo. {PAD}") == [(0, 101, "forward"), (101, 205, "summary")]
    # A longer phrase that does not end a word leaves room for the shorter one in it.
    assert cuts(f"{PAD}\nLet me checkmate {PAD}") == [(0, 101, "forward"), (101, 218, "forward")]


def test_line_phrases_cut_at_line_starts_only():
    assert cuts(f"{PAD}So {PAD}Therefore {PAD}Now {PAD}") == [(0, 417, "forward")]
    assert cuts(f"So {PAD}\nNow {PAD}") == [(0, 104, "forward"), (104, 208, "forward")]


def test_short_turn_beside_the_final_step_stays():
    text = f"{PAD}\nWait.\n**Final Answer** 3"
    for compat in (True, False):
        assert cuts(text, compat=compat) == [(0, 101, "forward"), (101, 107, "turn"), (107, 125, "final")]


def test_short_step_before_a_turn_goes_left_also_before_the_last():
    text = f"{PAD}\nLet me see.\nWait, {PAD}"
    assert cuts(text, compat=True) == [(0, 101, "forward"), (101, 219, "forward")]
    assert cuts(text) == [(0, 113, "forward"), (113, 219, "turn")]
    for compat in (True, False):
        longer = cuts(f"{text}\nSo x.{PAD}", compat=compat)
        assert longer == [(0, 113, "forward"), (113, 220, "turn"), (220, 325, "summary")]


def test_nothing_is_merged_into_the_final_step():
    text = f"{PAD}\n**Final Answer**\nSo the value follows from above.\n"
    assert cuts(text, compat=True) == [(0, 101, "forward"), (101, 151, "final")]
    assert cuts(text) == [(0, 101, "forward"), (101, 118, "final"), (118, 151, "summary")]


def test_short_first_step():
    turn = f"A sum.\nWait, {PAD}"
    after = f"\nWait, {PAD}"
    assert cuts(turn + after, compat=True) == [(0, 7, "forward"), (7, 114, "turn"), (114, 220, "turn")]
    assert cuts(turn + after) == [(0, 114, "forward"), (114, 220, "turn")]
    # Blank text is not a step that could swallow the kind of what follows.
    assert cuts(f"\n\nWait, {PAD}{after}") == [(0, 109, "turn"), (109, 215, "turn")]
    assert cuts(f"\n\nSo {PAD}{after}") == [(0, 106, "forward"), (106, 212, "turn")]


def test_bare_summary_joins_what_follows():
    assert cuts(f"{PAD}\nSo:\nNow {PAD}") == [(0, 101, "forward"), (101, 209, "summary")]
    rest = "a" * 16
    assert cuts(f"{PAD}\nSo{rest[:-1]}") == [(0, 118, "forward")]
    assert cuts(f"{PAD}\nSo {rest}\nNow {PAD}") == [(0, 121, "forward"), (121, 225, "forward")]


def test_phrase_lists():
    assert [len(kind) for kind in (ENGLISH_PHRASES.turn, ENGLISH_PHRASES.forward, ENGLISH_PHRASES.summary)] == [
        57,
        24,
        7,
    ]
    assert set(PUBLISHED_PHRASES.turn) - set(ENGLISH_PHRASES.turn) == {"No,Let me double-check"}
    assert set(ENGLISH_PHRASES.turn) - set(PUBLISHED_PHRASES.turn) == {"No,", "Let me double-check"}


def test_phrases_of_another_language(tmp_path):
    path = tmp_path / "chinese.json"
    record = {
        "turn": ["等等", "不对"],
        "forward": ["首先", "接下来"],
        "summary": ["所以", "因此"],
        "whole_words": False,
    }
    path.write_text(json.dumps(record), encoding="utf-8")
    phrases = ReasoningPhrases.from_file(path)
    assert phrases.final == ("**Final Answer",)
    text = "题" * 100 + "等等我再看看" + "题" * 100 + "\n所以答案是五" + "题" * 100
    assert cuts(text, phrases=phrases) == [(0, 100, "forward"), (100, 207, "turn"), (207, 313, "summary")]
    with_words = ReasoningPhrases(phrases.turn, phrases.forward, phrases.summary)
    assert cuts(text, phrases=with_words) == [(0, 313, "forward")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"turn": ["a"]}, "turn, forward, summary"),
        ({"turn": ["a"], "forward": [], "summary": [], "extra": []}, "turn, forward, summary"),
        ({"turn": "Wait", "forward": [], "summary": []}, "phrases.turn"),
        ({"turn": [""], "forward": [], "summary": []}, "phrases.turn"),
        ({"turn": ["So"], "forward": [], "summary": ["So"]}, "'So' is both 'turn' and 'summary'"),
        ({"turn": [], "forward": [], "summary": [], "final": []}, "empty"),
        ({"turn": ["a"], "forward": [], "summary": [], "whole_words": "no"}, "whole_words='no'"),
    ],
)
def test_bad_phrase_files_are_refused(tmp_path, record, message):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        ReasoningPhrases.from_file(path)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="min_step_chars=-1"):
        split_reasoning("a", min_step_chars=-1)
    with pytest.raises(ValueError, match="min_rest_chars=-2"):
        split_reasoning("a", min_rest_chars=-2)
    with pytest.raises(ValueError, match="compat=True"):
        split_reasoning("a", compat=True, phrases=ENGLISH_PHRASES)


PIECES = [*ENGLISH_PHRASES.turn, *ENGLISH_PHRASES.forward, *ENGLISH_PHRASES.summary, "**Final Answer", "\n", "\n\n"]
any_thinking = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=40), st.just(PAD)), max_size=30).map(
    "".join
)


@settings(deadline=None, max_examples=300)
@given(text=any_thinking, compat=st.booleans(), min_step_chars=st.integers(0, 120))
def test_steps_partition_any_text(text, compat, min_step_chars):
    steps = split_reasoning(text, compat=compat, min_step_chars=min_step_chars)
    thinking = text.split("</think>")[0]
    assert "".join(thinking[step.start : step.end] for step in steps) == thinking
    assert all(step.start < step.end and step.kind in ("turn", "forward", "summary", "final") for step in steps)


@settings(deadline=None, max_examples=300)
@given(text=any_thinking)
def test_a_short_step_has_nowhere_to_go(text):
    steps = split_reasoning(text)
    kinds = [None, *(step.kind for step in steps), None]
    for step, left, right in zip(steps, kinds[:-2], kinds[2:], strict=True):
        if step.kind == "final" or step.end - step.start >= 80:
            continue
        assert right in (None, "final")
        if step.kind == "summary":
            assert left in (None, "final")


@settings(deadline=None, max_examples=300)
@given(text=any_thinking)
def test_final_steps_hold_nothing_but_their_own_cut(text):
    unmerged, merged = split_reasoning(text, min_step_chars=0), split_reasoning(text)
    final = [(step.start, step.end) for step in unmerged if step.kind == "final"]
    assert [(step.start, step.end) for step in merged if step.kind == "final"] == final


def test_paragraphs():
    text = "\n\nFirst\nline.\n \n\n  Second.\n\nThird.\n\n"
    steps = split_paragraphs(text + "</think>\n\nAnswer")
    assert [text[step.start : step.end] for step in steps] == [
        "\n\nFirst\nline.\n \n\n  ",
        "Second.\n\n",
        "Third.\n\n",
    ]
    assert {step.kind for step in steps} == {"paragraph"}
    assert split_paragraphs("") == split_reasoning("") == []


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("a \n\t\u3000🙂"), max_size=60))
def test_paragraphs_partition_any_text(text):
    steps = split_paragraphs(text)
    assert "".join(text[step.start : step.end] for step in steps) == text
    pieces = [text[step.start : step.end] for step in steps]
    assert all(piece.strip() for piece in pieces) or len(pieces) == 1


def test_phrases_are_counted_before_short_steps_are_merged():
    text = "Okay, let us see.\nSo it is 3. Wait, no.\nSo 4.\nNow Butter.\n**Final Answer**\n4</think>Wait"
    assert Splitter().phrase_counts(text.partition("</think>")[0]) == {
        "turn": 1,
        "forward": 1,
        "summary": 2,
        "final": 1,
    }
    assert Splitter().phrase_counts("") == {"turn": 0, "forward": 0, "summary": 0, "final": 0}
