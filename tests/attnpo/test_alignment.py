"""Steps on sampled tokens, with tokenizers built here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from attn_trainers.attnpo.alignment import reasoning_step_ranges, token_char_spans
from attn_trainers.attnpo.steps import Step, split_paragraphs, split_reasoning


CORPUS = [
    "Okay, so I need to compute the sum.\n\nWait, that is wrong. Let me check again.\n",
    "So the answer is 42.\n**Final Answer** $x = \\frac{1}{2}$ 答案是四十二。 Ответ: 🙂🙃 naïve café",
] * 20


def byte_tokenizer(vocab_size: int, *, special_end: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 byte tokens and, with a larger vocabulary, merges learned from the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<eos>"])
    if special_end:
        tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As in Llama 2: words carry a leading block for the space, unknown characters fall back to one token a byte."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁So", "▁it", "▁is", "So", "is", "x"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


BYTES = byte_tokenizer(256, special_end=False)
BPE = byte_tokenizer(420, special_end=True)
LLAMA = llama_tokenizer()
BYT5 = ByT5Tokenizer()

tokenizers_under_test = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
any_text = st.text(st.one_of(st.sampled_from("So wait\n .🙂é答\u0301\u200d\ufffd"), st.characters(codec="utf-8")))


def byte_spans(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Reference: which characters the bytes of each token lie in."""
    decode_byte = {char: byte for byte, char in _byte_alphabet().items()}
    pieces = [
        token.encode() if token in ("<eos>", "</think>") else bytes(decode_byte[char] for char in token)
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]
    owner = [index for index, char in enumerate(b"".join(pieces).decode()) for _ in char.encode()]
    spans, offset = [], 0
    for piece in pieces:
        spans.append((owner[offset], owner[offset + len(piece) - 1] + 1))
        offset += len(piece)
    return spans


def _byte_alphabet() -> dict[int, str]:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in shown}
    alphabet |= {byte: chr(256 + rank) for rank, byte in enumerate(b for b in range(256) if b not in alphabet)}
    return alphabet


@tokenizers_under_test
@settings(deadline=None, max_examples=150)
@given(text=st.text(st.sampled_from("So wait\n .🙂é答\u0301\u200dЖ"), max_size=60))
def test_spans_are_the_characters_of_the_tokens_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    decoded, spans = token_char_spans(tokenizer, ids)
    assert decoded == text
    assert spans == byte_spans(tokenizer, ids)


@tokenizers_under_test
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_spans_cover_the_text_of_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=200))
    text, spans = token_char_spans(tokenizer, ids)
    assert len(spans) == len(ids)
    assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    covered = previous = 0
    for start, end in spans:
        assert previous <= start <= covered <= end
        previous, covered = start, end
    assert covered == len(text)


def test_a_character_over_several_tokens_is_in_the_span_of_each():
    ids = BYTES.encode("a🙂b")
    assert len(ids) == 6
    assert token_char_spans(BYTES, ids) == ("a🙂b", [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)])


def test_a_literal_replacement_character_is_a_character_of_its_own():
    ids = BYTES.encode("a\ufffdb")
    assert token_char_spans(BYTES, ids)[1] == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]


@pytest.mark.parametrize("repeat", [1, 3, 40])
def test_leading_space_of_sentencepiece_is_stripped_once(repeat):
    ids = LLAMA.convert_tokens_to_ids(["▁So", "▁it", "▁is", "▁"] * repeat)
    text, spans = token_char_spans(LLAMA, ids)
    assert text == LLAMA.decode(ids, clean_up_tokenization_spaces=False) == (" So it is " * repeat)[1:]
    lengths = [end - start for start, end in spans]
    assert lengths == [2] + ([3, 3, 1, 3] * repeat)[:-1]


def test_byte_fallback_tokens_share_their_character():
    pieces = ["▁So", *(f"<0x{byte:02X}>" for byte in "答🙂".encode()), "▁is"]
    text, spans = token_char_spans(LLAMA, LLAMA.convert_tokens_to_ids(pieces))
    assert text == "So答🙂 is"
    assert spans == [(0, 2)] + [(2, 3)] * 3 + [(3, 4)] * 4 + [(4, 7)]


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, len(LLAMA) - 1), max_size=120))
def test_spans_cover_the_text_of_any_ids_with_byte_fallback(ids):
    text, spans = token_char_spans(LLAMA, ids)
    covered = previous = 0
    for start, end in spans:
        assert previous <= start <= covered <= end
        previous, covered = start, end
    assert (len(spans), covered) == (len(ids), len(text))


def test_decoder_that_drops_incomplete_characters():
    text = "答案是🙂四十二。" * 12
    decoded, spans = token_char_spans(BYT5, BYT5.encode(text, add_special_tokens=False))
    assert decoded == text
    assert spans[0] == (0, 0) and spans[2] == (0, 1) and spans[-1] == (len(text) - 1, len(text))


def test_tokens_without_text_have_empty_spans():
    unused = len(BPE) + 5
    a, b = BPE.encode("a")[0], BPE.encode("b")[0]
    text, spans = token_char_spans(BPE, [a] + [unused] * 100 + [b])
    assert text == "ab"
    assert spans == [(0, 1)] + [(1, 1)] * 100 + [(1, 2)]


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


def test_number_of_decoded_tokens_is_linear():
    class Counting:
        decoded = 0

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return BPE.decode(ids, **options)

    counts = []
    for ids in (BPE.encode(THINKING) * 20, BPE.encode(THINKING) * 40, [BYTES.encode("答")[0]] * 4000):
        counting = Counting()
        token_char_spans(counting, ids)
        counts.append(counting.decoded / len(ids))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    assert max(counts[:2]) < 16
    assert counts[2] < 128  # bytes that never make a character: the longest wait, twice
