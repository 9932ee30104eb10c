"""Steps of a completion."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from attn_trainers.attnrl.steps import StepDelimiters, StepSegmentation, segment_steps
from attn_trainers.thinking import EndOfThinking
from tests.token_helpers import byte_tokenizer, ids_of, llama_tokenizer, piece_tokenizer


WORDS = piece_tokenizer("a", "b", "c", "d", "\n\n", "\n", "</think>", "</", "think", ">\n\n")  # "a" has id 1
PARAGRAPH, NEWLINE, STOP = ids_of(WORDS, "\n\n", "\n", "</think>")
DELIMITERS = StepDelimiters(frozenset({PARAGRAPH}), frozenset({PARAGRAPH, NEWLINE}), EndOfThinking(WORDS))


def test_paragraphs_end_their_steps_and_the_prompt_is_step_zero():
    steps = segment_steps(3, [1, PARAGRAPH, 2, 3, PARAGRAPH, STOP, 4], DELIMITERS)
    assert steps == StepSegmentation([(0, 3), (3, 5), (5, 8), (8, 10)], stop_step=3)
    assert steps.num_steps == 3


@pytest.mark.parametrize(
    ("completion", "bounds"),
    [
        ([1, NEWLINE, 2, PARAGRAPH, 3], [0, 4, 5]),  # a newline does not count beside a paragraph
        ([1, NEWLINE, NEWLINE, 2], [0, 2, 3, 4]),  # two newline tokens make no paragraph
        ([1, 2, 3], [0, 1, 2, 3]),  # without any delimiter each token is a step
        ([1, 2, PARAGRAPH], [0, 3]),  # a closing delimiter opens no further step
        ([PARAGRAPH, PARAGRAPH], [0, 1, 2]),
        ([1], [0, 1]),
    ],
)
def test_delimiters_by_precedence(completion, bounds):
    ranges = segment_steps(5, completion, DELIMITERS).ranges
    assert ranges == [(0, 5)] + [(5 + start, 5 + end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def test_an_empty_completion_has_no_step():
    steps = segment_steps(4, [], DELIMITERS)
    assert steps == StepSegmentation([(0, 4)], stop_step=-1)
    assert steps.num_steps == 0


@pytest.mark.parametrize(
    ("completion", "stop_step"),
    [
        ([STOP, PARAGRAPH, 1, PARAGRAPH, STOP, 2], 3),  # the last end of thinking counts
        ([STOP, PARAGRAPH, 1], 1),
        ([1, PARAGRAPH, 2, STOP], 2),
        ([1, PARAGRAPH, 2], -1),
    ],
)
def test_stop_step_holds_the_last_end_of_thinking(completion, stop_step):
    assert segment_steps(2, completion, DELIMITERS).stop_step == stop_step


def test_no_stop_step_for_a_model_without_an_end_of_thinking():
    delimiters = StepDelimiters(DELIMITERS.paragraph, DELIMITERS.newline)
    assert segment_steps(2, [1, PARAGRAPH, STOP], delimiters).stop_step == -1


def test_stop_step_of_an_end_over_several_tokens():
    delimiters = StepDelimiters.from_tokenizer(WORDS)
    completion = ids_of(WORDS, "a", "\n\n", "b", "</", "think", ">\n\n", "c")
    # The token that completes the end is the paragraph's delimiter too; it belongs to the step it ends.
    assert segment_steps(2, completion, delimiters) == StepSegmentation([(0, 2), (2, 4), (4, 8), (8, 9)], stop_step=2)
    twice = completion + ids_of(WORDS, "\n\n", "</think>", "\n\n", "d")
    assert segment_steps(2, twice, delimiters).stop_step == 4


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt_length=0"):
        segment_steps(0, [1, 2], DELIMITERS)


@settings(deadline=None, max_examples=300)
@given(
    prompt_length=st.integers(1, 9),
    completion=st.lists(st.sampled_from([1, 2, PARAGRAPH, NEWLINE, STOP]), max_size=30),
)
def test_steps_partition_the_sequence_and_end_at_delimiters(prompt_length, completion):
    steps = segment_steps(prompt_length, completion, DELIMITERS)
    covered = [t for start, end in steps.ranges for t in range(start, end)]
    assert covered == list(range(prompt_length + len(completion)))
    assert all(start < end for start, end in steps.ranges)
    table = set(completion)  # every token delimits where there is neither paragraph nor newline
    for candidates in (DELIMITERS.newline, DELIMITERS.paragraph):
        table = set(candidates) if candidates & set(completion) else table
    for index, (start, end) in enumerate(steps.ranges[1:], start=1):
        tokens = completion[start - prompt_length : end - prompt_length]
        assert not table & set(tokens[:-1])
        assert tokens[-1] in table or index == steps.num_steps
        # the stop step holds an end of thinking, later steps hold none
        if index >= steps.stop_step:
            assert (STOP in tokens) == (index == steps.stop_step)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = ["<unk>", "a", ".\n\n", "\n", ")\n", "\n\n\n", "\n \n", "</", "think", ">"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tables_hold_the_base_vocabulary_decoded_token_by_token(tokenizer):
    tokenizer.add_tokens(["<|end|>\n\n"], special_tokens=True)  # outside the base vocabulary
    for end_of_thinking in (None, ""):
        delimiters = StepDelimiters.from_tokenizer(tokenizer, end_of_thinking)
        assert (delimiters.paragraph, delimiters.newline) == (frozenset({2, 5}), frozenset({2, 3, 4, 5, 6}))
        assert delimiters.thinking is None


def test_an_unknown_mode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="step_mode='words' is unknown; set it to one of paragraphs, lines, sent"):
        StepDelimiters.from_tokenizer(tokenizer, step_mode="words")


def texts_of(tokenizer, text: str, mode: str) -> list[str]:
    """Texts of the steps of a completion."""
    ids = tokenizer.encode(text)
    ranges = segment_steps(1, ids, StepDelimiters.from_tokenizer(tokenizer, step_mode=mode)).ranges
    return [tokenizer.decode(ids[start - 1 : end - 1]) for start, end in ranges[1:]]


BYTES, MERGES = byte_tokenizer(256, special_end=False), byte_tokenizer(420, special_end=True)


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("lines", ["One line\n", "two: \n \n\n", "  three. 3b\n", "four"]),
        ("lines", ["\n\n \nOne\n", "two\n\n<eos>"]),  # blank text and an end of sequence are no steps
        ("sentences", ["One.", " Two!", " Three?", " Four"]),
        ("sentences", ["Pi is 3.14, e.g. here.", " It is"]),
        ("sentences", ["See e.g. (i.e. U.S.A. law) x.", " Then 5! = 120."]),
        ("sentences", ['He said "no."', " *So be it.*", " (Is $x = 5.$)"]),
        ("sentences", ["Is it?!", " Yes...", " well"]),
        ("sentences", ["Steps:\n\n", "1. Add 2.\n", " - 2) Take 1.", " Done:\n", "10. So 3.\n   \n", "x"]),
        ("sentences", ["我们算。", "是五！", "「对吗？」", "得5。", "3.5"]),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTES, MERGES], ids=["bytes", "merges"])
def test_lines_and_sentences(tokenizer, mode, steps):
    assert texts_of(tokenizer, "".join(steps), mode) == steps


@pytest.mark.parametrize(("mode", "text"), [("lines", "One. Two."), ("sentences", "3.14 a.b"), ("sentences", "")])
def test_a_completion_without_delimiters_is_cut_after_every_token(mode, text):
    assert texts_of(BYTES, text, mode) == list(text)


def test_a_delimiter_inside_a_token_ends_the_step_of_that_token():
    tokenizer = piece_tokenizer("a", "b", ".", " ", ". b", "\nb", ")\n\n")
    delimiters = StepDelimiters.from_tokenizer(tokenizer, step_mode="sentences")
    pieces = ["a", ".", " ", "b", ". b", "a", "\nb", "a", ")\n\n", "b"]
    ranges = segment_steps(1, ids_of(tokenizer, *pieces), delimiters).ranges
    assert ranges == [(0, 1), (1, 3), (3, 6), (6, 8), (8, 10), (10, 11)]


def test_byte_tokens_of_a_full_stop_stay_together():
    tokenizer = llama_tokenizer()
    pieces = [
        "▁So",
        *(f"<0x{byte:02X}>" for byte in "。".encode()),
        "▁it",
        *(f"<0x{byte:02X}>" for byte in b".\n"),
        "x",
    ]
    delimiters = StepDelimiters.from_tokenizer(tokenizer, step_mode="sentences")
    assert segment_steps(1, ids_of(tokenizer, *pieces), delimiters).ranges == [(0, 1), (1, 5), (5, 8), (8, 9)]


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.sampled_from("ab1 .!?。！\n)*🙂"), max_size=60), mode=st.sampled_from(["lines", "sentences"]))
def test_lines_and_sentences_partition_any_text(text, mode):
    steps = texts_of(BYTES, text, mode)
    ids = BYTES.encode(text)
    if len(steps) == len(ids):
        return
    assert "".join(steps) == text
    assert all(step.strip() for step in steps[:-1])
    for step in steps[:-1]:
        # A line's end ends a step, but for blank lines in front of it or behind it.
        assert "\n" not in step.strip()
        assert step.rstrip() != step or mode == "sentences"


@pytest.mark.parametrize("text", ["." * 40_000 + "a", "a." * 20_000, "! " * 9_000 + "\n" * 9_000, "5!" * 20_000])
def test_hostile_text_is_cut(text):
    delimiters = StepDelimiters(frozenset(), frozenset(), mode="sentences", tokenizer=BYTES)
    assert sum(end - start for start, end in segment_steps(1, BYTES.encode(text), delimiters).ranges[1:]) == len(text)
