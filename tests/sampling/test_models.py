"""Tokenizers as their file says, adapters, and what a config says of a model's length."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from attn_trainers.attnrl.steps import StepDelimiters
from attn_trainers.sampling.models import (
    computed_dtype,
    load_config,
    load_model,
    load_tokenizer,
    num_positions,
    refuse_adapter,
    tokenizer_of,
)
from attn_trainers.tiny.arithmetic import build_model
from attn_trainers.tiny.byte_model import build_byte_model


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WARNING = "LlamaTokenizer does not reproduce tokenizer.json, which is read as it stands."
TEXT = "add 9 and 6.\n\nso it is 15"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_byte_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def adapter(model, tmp_path):
    """Saves an adapter of the model that is not the identity."""

    def save(config):
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return save


# Tokenizers ------------------------------------------------------------------------------------------


@pytest.fixture
def byte_level_file(tmp_path):
    """Saves a byte-level tokenizer.json, with one token for a blank line, under another class's name."""

    def save(model_type, tokenizer_class):
        vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *ALPHABET, "ĊĊ"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return save


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_does_not_reproduce_the_file_gives_way_to_it(
    byte_level_file, caplog, model_type, tokenizer_class
):
    folder = byte_level_file(model_type, tokenizer_class)
    rebuilt = AutoTokenizer.from_pretrained(folder)  # newer transformers read the file themselves
    loses = rebuilt.decode(rebuilt(TEXT, add_special_tokens=False)["input_ids"]) != TEXT
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    messages = [r.getMessage() for r in caplog.records if r.name == "attn_trainers.sampling.models"]
    assert [message.partition(": ")[2] for message in messages] == [WARNING] * loses
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
    assert len(StepDelimiters.from_tokenizer(tokenizer).paragraph) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")


def test_the_file_is_read_where_the_class_that_is_chosen_loses_text(byte_level_file, caplog, monkeypatch):
    folder = byte_level_file("llama", "LlamaTokenizer")
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.normalizer = normalizers.Replace(" ", "")
    loses = PreTrainedTokenizerFast(tokenizer_object=file)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: loses)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert WARNING.replace("LlamaTokenizer", type(loses).__name__) in caplog.text
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


def test_a_class_that_reproduces_its_file_is_kept(tmp_path, caplog):
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, "<|endoftext|>"])}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    made.save_pretrained(tmp_path)
    # Padding and truncation that were on when the file was saved are no part of what it says of a text.
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.enable_padding(length=200)
    file.enable_truncation(5)
    file.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "attn_trainers"):
        tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer) is Qwen2Tokenizer and caplog.records == []
    assert tokenizer(TEXT)["input_ids"] == made(TEXT)["input_ids"]


def test_word_level_tokenizer_beside_a_qwen2_model(tmp_path):
    build_byte_model(tmp_path)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("one two two")["input_ids"] == [1, 2, 2]
    assert tokenizer.pad_token == "[UNK]"


# Adapters --------------------------------------------------------------------------------------------


def test_an_adapter_is_refused_where_a_model_is_needed_and_the_advice_works(model, adapter, tmp_path):
    path = adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    refuse_adapter(str(model), "model_name_or_path")
    with pytest.raises(ValueError, match="^model_name_or_path='.*adapter' is an adapter of '.*tiny', no model; merge"):
        refuse_adapter(path, "model_name_or_path")
    load_model(path, "auto").save_pretrained(tmp_path / "merged")
    tokenizer_of(path).save_pretrained(tmp_path / "merged")
    refuse_adapter(str(tmp_path / "merged"), "model_name_or_path")
    ids = torch.tensor([tokenizer_of(str(tmp_path / "merged"))("1 + 1")["input_ids"]])
    merged, base = (load_model(str(one), "auto")(ids).logits for one in (tmp_path / "merged", model))
    assert (merged - base).abs().max() > 1e-4
    torch.testing.assert_close(merged, load_model(path, "auto")(ids).logits)


def test_an_adapter_whose_base_is_gone_says_which(model, adapter):
    path = adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    assert load_config(path).hidden_size == 64
    file = f"{path}/adapter_config.json"
    with open(file) as stream:
        config = json.load(stream)
    for base, message in {
        "no/where": "is an adapter of 'no/where', which cannot be read .*; put that model there, or correct base_mo",
        None: "is an adapter that names no base model; set base_model_name_or_path",
    }.items():
        with open(file, "w") as stream:
            json.dump(config | {"base_model_name_or_path": base}, stream)
        with pytest.raises(ValueError, match=message):
            load_config(path)


def test_an_adapter_that_cannot_be_merged_is_refused(adapter):
    path = adapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="is an adapter of type PROMPT_TUNING, which cannot be merged into"):
        load_model(path, "auto")


def test_a_model_that_is_not_there_is_refused_in_a_line(tmp_path):
    path = str(tmp_path / "nothing")
    refuse_adapter(path, "model_name_or_path")  # no adapter either: what reads it as a model says so
    with pytest.raises(ValueError, match="^model='.*nothing' cannot be read .*; give a folder that holds") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


# Positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_positions_of_a_config(rope, expected):
    config = Qwen2Config(max_position_embeddings=512, rope_parameters=rope | {"rope_theta": 1e4})
    assert num_positions(config) == expected


def test_a_config_without_positions_sets_no_limit():
    assert num_positions(MambaConfig()) is None


@pytest.mark.parametrize(
    ("saved", "asked", "capabilities", "computed"),
    [
        ("float32", "auto", {"avx512_bf16": True}, torch.float32),
        ("bfloat16", "auto", {"avx512_bf16": True}, torch.bfloat16),
        ("bfloat16", "auto", {"avx2": True}, torch.float32),
        ("float16", "auto", {"avx512_bf16": True}, torch.float32),
        ("bfloat16", "bfloat16", {"avx2": True}, torch.bfloat16),
    ],
)
def test_a_cpu_without_instructions_for_a_dtype_computes_in_float32(
    tmp_path, monkeypatch, tiny_tokenizer, saved, asked, capabilities, computed
):
    model = build_model(tiny_tokenizer, 32, 1).to(getattr(torch, saved))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computed_dtype(str(tmp_path), asked) == str(computed).removeprefix("torch.")
    loaded = load_model(str(tmp_path), asked)
    assert loaded.dtype == computed
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(computed))  # a wider dtype loses nothing


def test_a_gpu_is_left_the_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert computed_dtype("nowhere", "auto") == "auto"
