"""Steps on sampled tokens, with tokenizers built here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_trainers.attnpo.alignment import exclusion_warning, reasoning_step_ranges
from attn_trainers.attnpo.steps import Step, split_paragraphs, split_reasoning
from tests.token_helpers import byte_tokenizer, ids_of, llama_tokenizer, piece_tokenizer


BYTES = byte_tokenizer(256, special_end=False)
BPE = byte_tokenizer(420, special_end=True)
LLAMA = llama_tokenizer()

tokenizers_under_test = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
any_text = st.text(st.one_of(st.sampled_from("So wait\n .🙂é答\u0301\u200d\ufffd"), st.characters(codec="utf-8")))


THINKING = (
    "Okay, I need to add two and three, and I write down every step of it so that it is long enough.\n"
    "So the answer is 5, because adding two and three gives five, as everybody knows since school.\n"
    "Hmm. That was fast, and now I look at it. Wait, let me see whether another base was meant in the problem."
)


@tokenizers_under_test
def test_golden_alignment(tokenizer):
    ids = tokenizer.encode(THINKING + "</think>\n\nFive: \\boxed{5}<eos>")
    alignment = reasoning_step_ranges(tokenizer, ids, splitter=split_reasoning)
    assert alignment.reason is None
    assert alignment.kinds == ["forward", "summary", "turn"]
    decoded = [tokenizer.decode(ids[start:end]) for start, end in alignment.step_ranges]
    # With merges, " Wait" is one token; it belongs to the step of its word although the step is cut after the space.
    assert [piece.strip() for piece in decoded] == [text.strip() for text in alignment.texts]
    assert alignment.texts[2].startswith("Wait, let me see")
    assert "".join(alignment.texts) == THINKING
    thinking_end = alignment.step_ranges[-1][1]
    assert tokenizer.decode(ids[thinking_end : alignment.answer_start]) == "</think>"
    assert alignment.answer_start - thinking_end == (1 if tokenizer is BPE else 8)
    assert tokenizer.decode(ids[alignment.answer_start :]) == "\n\nFive: \\boxed{5}<eos>"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_end_of_thinking"),
        (THINKING, "no_end_of_thinking"),
        (THINKING + "</think>a</think>b", "several_end_of_thinking"),
        (THINKING + "</think>", "no_answer"),
        ("</think>5", "too_few_steps"),
        ("Two and three is five.</think>5", "too_few_steps"),
    ],
)
def test_reasons(text, reason):
    alignment = reasoning_step_ranges(BPE, BPE.encode(text), splitter=split_reasoning)
    assert (alignment.reason, alignment.step_ranges, alignment.kinds, alignment.texts) == (reason, [], [], [])
    assert (alignment.answer_start is None) == reason.endswith("end_of_thinking")


def test_steps_without_tokens_are_merged():
    def every_character(thinking):
        return [Step(index, index + 1, str(index)) for index in range(len(thinking))]

    thinking = " So x"
    ids = LLAMA.convert_tokens_to_ids(["x", "▁So", "▁", "x", *(f"<0x{byte:02X}>" for byte in b"</think>"), "x"])
    alignment = reasoning_step_ranges(LLAMA, ids, splitter=every_character)
    assert alignment.step_ranges == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert alignment.kinds == ["0", "2", "4", "5"]
    assert alignment.texts == ["x ", "So", " ", "x"]
    assert "".join(alignment.texts) == "x" + thinking


@tokenizers_under_test
@settings(deadline=None, max_examples=150)
@given(thinking=any_text, answer=any_text, cuts=st.sets(st.integers(1, 80)))
def test_any_steps_partition_the_thinking_tokens(tokenizer, thinking, answer, cuts):
    def splitter(text):
        offsets = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
        return [Step(start, end, "forward") for start, end in zip(offsets[:-1], offsets[1:], strict=True)]

    ids = tokenizer.encode(f"{thinking}</think>{answer}<eos>")
    alignment = reasoning_step_ranges(tokenizer, ids, splitter=splitter)
    before, _, after = tokenizer.decode(ids, clean_up_tokenization_spaces=False).partition("</think>")
    assert tokenizer.decode(ids[alignment.answer_start :], clean_up_tokenization_spaces=False) == after
    if alignment.reason is not None:
        assert alignment.reason == "too_few_steps"
        return
    assert "".join(alignment.texts) == before
    covered = [token for start, end in alignment.step_ranges for token in range(start, end)]
    assert covered == list(range(alignment.step_ranges[-1][1]))
    assert all(start < end for start, end in alignment.step_ranges)
    middle = ids[len(covered) : alignment.answer_start]
    assert tokenizer.decode(middle) == "</think>"


@tokenizers_under_test
@settings(deadline=None, max_examples=50)
@given(
    paragraphs=st.lists(st.text(st.sampled_from("So it🙂答."), min_size=1).filter(str.strip), min_size=2, max_size=6)
)
def test_paragraph_steps(tokenizer, paragraphs):
    ids = tokenizer.encode("\n\n".join(paragraphs) + "</think>\n\nx")
    alignment = reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
    assert [text.strip() for text in alignment.texts] == [paragraph.strip() for paragraph in paragraphs]


def test_an_opening_that_the_completion_writes_is_in_no_step():
    answer = "</think>\n\nFive: \\boxed{5}<eos>"
    opened_by_prompt = reasoning_step_ranges(BPE, BPE.encode(THINKING + answer), splitter=split_reasoning)
    opening = BPE.encode("<think>")
    alignment = reasoning_step_ranges(BPE, opening + BPE.encode(THINKING + answer), splitter=split_reasoning)
    shift = len(opening)
    assert shift > 1
    assert alignment.step_ranges == [(start + shift, end + shift) for start, end in opened_by_prompt.step_ranges]
    assert alignment.answer_start == opened_by_prompt.answer_start + shift
    assert (alignment.kinds, alignment.texts) == (opened_by_prompt.kinds, opened_by_prompt.texts)


def test_an_opening_that_ends_inside_a_token():
    tokenizer = piece_tokenizer("<think", ">\n", "One.", "\n\n", "Two.", "</", "think", ">\n\n", "2")
    ids = ids_of(tokenizer, "<think", ">\n", "One.", "\n\n", "Two.", "</", "think", ">\n\n", "2")
    alignment = reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs)
    assert (alignment.step_ranges, alignment.answer_start) == ([(2, 4), (4, 5)], 8)
    assert alignment.texts == ["\nOne.\n\n", "Two."]


@pytest.mark.parametrize("end", ["</seed:think>", "[/THINK]", "<|end_of_thought|>"])
def test_any_text_ends_the_thinking(end):
    ids = BYTES.encode(f"One.\n\nTwo.{end}2")
    alignment = reasoning_step_ranges(BYTES, ids, splitter=split_paragraphs, end_of_thinking=end)
    assert (alignment.step_ranges, alignment.answer_start) == ([(0, 6), (6, 10)], 10 + len(end))


WITHOUT_TAGS = "First, 2 + 3 = \\boxed{5}.\n\nThen 5 + 1 = 6.\n\nSo it is $\\boxed{\\frac{6}{1}}$.<eos>"


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        ("last_boxed", ["First, 2 + 3 = \\boxed{5}.\n\n", "Then 5 + 1 = 6.\n\n", "So it is $"]),
        ("last_paragraph", ["First, 2 + 3 = \\boxed{5}.\n\n", "Then 5 + 1 = 6.\n\n"]),
    ],
)
def test_the_answer_of_a_model_without_tags(answer, before):
    ids = BYTES.encode(WITHOUT_TAGS)
    alignment = reasoning_step_ranges(BYTES, ids, splitter=split_paragraphs, answer=answer)
    assert alignment.texts == before
    assert alignment.answer_start == alignment.step_ranges[-1][1] == len("".join(before))
    tagged = reasoning_step_ranges(BYTES, ids, splitter=split_paragraphs)
    assert (tagged.reason, tagged.answer_start) == ("no_end_of_thinking", None)


def test_a_token_that_holds_the_beginning_of_the_answer_is_the_answers():
    tokenizer = piece_tokenizer("One.", "\n\n", "It is", " \\", "boxed", "{1}")
    ids = ids_of(tokenizer, "One.", "\n\n", "It is", " \\", "boxed", "{1}")
    alignment = reasoning_step_ranges(tokenizer, ids, splitter=split_paragraphs, answer="last_boxed")
    assert (alignment.step_ranges, alignment.answer_start) == ([(0, 2), (2, 3)], 3)


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("", "last_boxed", "no_answer"),
        ("", "last_paragraph", "no_answer"),
        ("\n\n<eos>", "last_paragraph", "no_answer"),
        ("One.\n\nTwo.\n\n\\boxed{", "last_boxed", "no_answer"),
        ("One.\n\nTwo.\n\n\\boxed{ }", "last_boxed", "no_answer"),
        ("\\boxed{2}", "last_boxed", "too_few_steps"),
        ("Two.\n\n<eos>", "last_paragraph", "too_few_steps"),  # the end of sequence is no paragraph
        ("One.\n\nTwo.\n\n<eos>", "last_paragraph", "too_few_steps"),
    ],
)
def test_reasons_without_tags(text, answer, reason):
    alignment = reasoning_step_ranges(BPE, BPE.encode(text), splitter=split_paragraphs, answer=answer)
    assert (alignment.reason, alignment.step_ranges) == (reason, [])
    assert (alignment.answer_start is None) == (reason == "no_answer")


def test_an_unknown_place_of_the_answer_is_refused():
    with pytest.raises(ValueError, match="answer='first' .*last_boxed"):
        reasoning_step_ranges(BPE, BPE.encode("a"), splitter=split_paragraphs, answer="first")


def test_a_warning_only_where_more_than_half_are_excluded():
    settings_of = {"end_of_thinking": "</think>", "answer": "tag"}
    assert exclusion_warning([], **settings_of) is None
    assert exclusion_warning(["no_answer", None], **settings_of) is None
    warning = exclusion_warning(["no_answer", None, "too_few_steps", "too_few_steps"], **settings_of)
    assert warning.startswith("3 of 4 responses get no step credit, 2 for too_few_steps: ")
    assert 'step_mode="paragraphs"' in warning


@pytest.mark.parametrize(
    ("reason", "texts", "answer", "advised"),
    [
        ("no_end_of_thinking", ["\\boxed{1}", "2"], "tag", 'tags, set answer="last_paragraph"'),
        ("no_end_of_thinking", ["\\boxed{1}", "\\boxed{2}"], "tag", r'answer="last_boxed" (2 of 2 hold a \boxed{})'),
        ("no_end_of_thinking", [], "tag", "end_of_thinking='</t>' is not in them"),
        ("several_end_of_thinking", [], "tag", "end_of_thinking='</t>' is in them more than once"),
        ("no_answer", [], "tag", "nothing follows the thinking. Raise max_completion_length"),
        ("no_answer", [], "last_boxed", 'Ask for one in the prompt, set answer="last_paragraph"'),
    ],
)
def test_the_warning_says_what_to_set(reason, texts, answer, advised):
    assert advised in exclusion_warning([reason] * 2, texts, end_of_thinking="</t>", answer=answer)
