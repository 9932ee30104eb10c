"""Tokenizers of several families, built on the spot."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


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


def piece_tokenizer(*pieces: str, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per given piece of text, the longest first, and <unk>; for ids that spell a text in a chosen way."""
    vocab = {piece: index for index, piece in enumerate(("<unk>", *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest = sorted(pieces, key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(char):x}}}" for char in piece) for piece in longest)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    if special:
        fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def ids_of(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    """The id of each piece; a piece that is no token is an error."""
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    unknown = [piece for piece, token in zip(pieces, ids, strict=True) if token in (None, tokenizer.unk_token_id)]
    assert not unknown, unknown
    return ids
