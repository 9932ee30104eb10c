"""Line starts and words by the text of single tokens."""

from attn_trainers.rhythm.token_texts import TokenTexts


def test_lines_begin_after_tokens_with_a_newline(tiny_tokenizer):
    texts = TokenTexts(tiny_tokenizer)
    ids = tiny_tokenizer("12 + 3 = 15\n\n15 - 4 = 11\n\n</think>\\boxed{11}\n\n")["input_ids"]
    starts = texts.line_starts(ids).tolist()
    assert [texts.text(ids[t]) for t in starts] == ["15", "</think>"]  # none after the last token
    assert texts.line_starts([]).tolist() == []


def test_words_have_a_letter_or_digit_and_are_not_special(tiny_tokenizer):
    texts = TokenTexts(tiny_tokenizer)
    words = {"12": True, " + ": False, "\n\n": False, "}": False, "\\boxed{": True, "<eos>": False}
    ids = tiny_tokenizer.convert_tokens_to_ids(list(words))
    assert texts.is_word(ids).tolist() == list(words.values())
