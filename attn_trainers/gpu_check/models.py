"""Models of random weights that checks make where no real one is given, and what they are trained on."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .registry import Context
from .shapes import SHAPES


NEWLINES = 16  # one word in so many ends a paragraph: random tokens have steps then


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A vocabulary of `size` made-up words, of which some end a paragraph, with an end token and `</think>`."""
    words = ["<eos>", "<unk>", "<think>", "</think>"]
    words += [f"w{i}\n\n" if i % NEWLINES == 0 else f"w{i} " for i in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def save_model(folder: Path, context: Context, *, layers: int | None = None, tied: bool = False, moe: bool = False):
    """Save a random model with its tokenizer, unless it is there; seeded.

    Args:
        folder: to save it in.
        context: of the run: a 1.5B's shape, or a tiny one in a smoke run.
        layers: fewer than the shape has, for checks that do not depend on depth.
        tied: whether the output head is the embedding.
        moe: a mixture of experts.

    Returns:
        `folder`, as a text.
    """
    if (folder / "config.json").exists():
        return str(folder)
    shape = dict(SHAPES["tiny" if context.smoke else "1p5b"])
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    tokenizer = word_tokenizer(shape["vocab_size"])
    common = {
        "max_position_embeddings": 16_384,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if moe:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
        experts |= {"hidden_size": 512 if not context.smoke else 128, "num_attention_heads": 4}
        config, model_class = Qwen3MoeConfig(**shape | experts | common), Qwen3MoeForCausalLM
    else:
        config, model_class = Qwen2Config(**shape | common), Qwen2ForCausalLM
    torch.manual_seed(0)
    with torch.device(context.device):
        model = model_class(config)
    if not context.smoke:
        model = model.to(torch.bfloat16)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # its config comes last, and says that the folder is whole
    return str(folder)


def model_folder(context: Context) -> str:
    """The real model, or the random one."""
    return context.model or save_model(context.folder / "models" / "random", context)


def load(context: Context, attn_implementation: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the run's device, ready to be read."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(context), attn_implementation=attn_implementation, dtype=dtype
    )
    return model.to(context.device).eval()


def word_problems(count: int) -> Dataset:
    """Prompts of made-up words; what the random model makes of them is scored by its tokens alone."""
    return Dataset.from_list([{"prompt": "".join(f"w{17 * i + j} " for j in range(8))} for i in range(count)])


def odd_sum(completions, completion_ids, **kwargs) -> list[float]:
    """Right and wrong completions in about equal shares, whatever the model writes."""
    return [float(sum(ids) % 2) for ids in completion_ids]
