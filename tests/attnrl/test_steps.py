"""Steps of a completion."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from attn_trainers.attnrl.steps import StepDelimiters, StepSegmentation, segment_steps


PARAGRAPH, NEWLINE, STOP = 100, 101, 102
DELIMITERS = StepDelimiters(frozenset({PARAGRAPH}), frozenset({PARAGRAPH, NEWLINE}), STOP)


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


def test_no_stop_step_without_a_token_for_the_end_of_thinking():
    delimiters = StepDelimiters(DELIMITERS.paragraph, DELIMITERS.newline, None)
    assert segment_steps(2, [1, PARAGRAPH, STOP], delimiters).stop_step == -1


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
    delimiters = StepDelimiters.from_tokenizer(tokenizer, end_of_thinking=None)
    assert delimiters == StepDelimiters(frozenset({2, 5}), frozenset({2, 3, 4, 5, 6}), None)


def test_end_of_thinking_is_the_token_that_the_text_is(tokenizer):
    tokenizer.add_tokens(["</think>"])
    assert StepDelimiters.from_tokenizer(tokenizer).end_of_thinking == 10


def test_no_end_of_thinking_where_its_text_is_several_tokens(tokenizer, caplog):
    num_tokens = len(tokenizer.encode("</think>", add_special_tokens=False))
    assert num_tokens > 1
    assert StepDelimiters.from_tokenizer(tokenizer).end_of_thinking is None
    assert f"end_of_thinking='</think>' is {num_tokens} tokens" in caplog.text
