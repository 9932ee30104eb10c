"""Small decoders of several architectures, a padded batch, and dense attention maps to compare with."""

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_decoder(name: str, **changes) -> PreTrainedModel:
    torch.manual_seed(1)
    if name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **changes}))
    elif name == "qwen2-sliding":  # full attention in layer 0, windows of 16 in layers 1 and 2
        config = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **config, **changes}))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "head_dim": 8, **changes}))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4, **changes}))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**{**SMALL, "sliding_window": 11, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # away from uniform attention
    return model.eval()


def dense_maps(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(L, H, n, n) float64 attention maps of one unpadded sequence, from eager attention."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(usual)
    return torch.stack(maps)[:, 0].double()


class PaddedBatch:
    """Three sequences of 120, 300 and 37 tokens: padded on the left, on both sides, on the right."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.offsets, width = [120, 300, 37], [187, 3, 0], 307
        self.prompt_lengths, num_cuts = [20, 9, 5], [25, 190, 6]
        self.ids = torch.randint(0, 97, (3, width), generator=generator)
        self.mask = torch.zeros(3, width, dtype=torch.long)
        self.ranges = []
        for row, (length, offset, prompt) in enumerate(
            zip(self.lengths, self.offsets, self.prompt_lengths, strict=True)
        ):
            self.mask[row, offset : offset + length] = 1
            cuts = torch.randperm(length - prompt - 1, generator=generator)[: num_cuts[row]] + prompt + 1
            edges = [0, prompt, *sorted(cuts.tolist()), length]
            self.ranges.append(list(zip(edges[:-1], edges[1:], strict=True)))

    def sequence(self, row: int) -> Tensor:
        return self.ids[row, self.offsets[row] : self.offsets[row] + self.lengths[row]]


@pytest.fixture(params=["qwen2", "qwen2-sliding", "qwen3", "llama", "mistral"])
def decoder(request) -> PreTrainedModel:
    return make_decoder(request.param)


@pytest.fixture
def qwen2() -> PreTrainedModel:
    return make_decoder("qwen2")


@pytest.fixture
def uniform_qwen2() -> PreTrainedModel:
    """Every query is zero, so token t attends with weight 1 / (t + 1) to itself and all before it."""
    model = make_decoder("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    return model


@pytest.fixture(scope="session")
def batch() -> PaddedBatch:
    return PaddedBatch()


@pytest.fixture(scope="session")
def eager():
    """The function from a model and one sequence to its dense maps."""
    return dense_maps


@pytest.fixture(scope="session")
def golden(shared_dir):
    """Reference model (float32) and reference cases."""
    import json

    folder = shared_dir / "golden"
    model = Qwen2ForCausalLM.from_pretrained(folder / "tiny-qwen2", dtype=torch.float32).eval()
    return model, json.loads((folder / "attention_signals.json").read_text())["cases"]
