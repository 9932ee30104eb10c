"""Characters of sampled tokens, with tokenizers built here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from attn_trainers.token_spans import token_char_spans
from tests.token_helpers import byte_tokenizer, llama_tokenizer


BYTES = byte_tokenizer(256, special_end=False)
BPE = byte_tokenizer(420, special_end=True)
LLAMA = llama_tokenizer()
BYT5 = ByT5Tokenizer()

tokenizers_under_test = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


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


def test_number_of_decoded_tokens_is_linear():
    class Counting:
        decoded = 0

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return BPE.decode(ids, **options)

    counts = []
    text = "Two and three is five 🙃, as everybody knows. Wait, let me see whether another base was meant.\n" * 3
    assert "\ufffd" in BPE.decode(BPE.encode("🙃")[:1])  # so the tokens' own texts are not enough
    for ids in (BPE.encode(text) * 20, BPE.encode(text) * 40, [BYTES.encode("答")[0]] * 4000):
        counting = Counting()
        token_char_spans(counting, ids)
        counts.append(counting.decoded / len(ids))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    assert max(counts[:2]) < 16
    assert counts[2] < 128  # bytes that never make a character: the longest wait, twice
