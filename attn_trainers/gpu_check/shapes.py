"""Shapes of Qwen2 models, and models of random weights in them."""

from collections.abc import Mapping

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


SHAPES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "wide": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 4096,
    },
    "1p5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}


def random_model(shape: Mapping[str, int], length: int, device: str) -> Qwen2ForCausalLM:
    """A model for sequences of up to `length` tokens: bfloat16 on CUDA, float32 on a CPU."""
    config = Qwen2Config(**shape, max_position_embeddings=length)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(torch.float32 if device == "cpu" else torch.bfloat16)
