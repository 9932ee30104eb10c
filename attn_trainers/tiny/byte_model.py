"""A small byte-level model made on the spot, to try things without a download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


_BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token per byte, thinking tags, an end token that also pads, and a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<think>", "</think>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.chat_template = _BYTE_CHAT_TEMPLATE
    return fast


def small_config(tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int, **more) -> Qwen2Config:
    """A Qwen2 with heads of 32, the smallest that vLLM's CPU attention takes.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens.
        hidden_size: a multiple of 32.
        num_layers: decoder layers.
        more: further fields of the config.
    """
    return Qwen2Config(
        **{"tie_word_embeddings": False} | more,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_byte_model(path: str | Path, seed: int = 0) -> Path:
    """Save an untrained Qwen2 of 2 layers with a byte-level tokenizer; the same seed gives the same weights.

    Returns:
        `path`, the folder it was saved in.
    """
    path = Path(path)
    tokenizer = build_byte_tokenizer()
    config = small_config(tokenizer, 64, 2, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=4096)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
