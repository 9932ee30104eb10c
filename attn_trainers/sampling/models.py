"""Loading of models, adapters and tokenizers by folder or Hub id."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file


logger = logging.getLogger(__name__)

# Names under which a tokenizer says of itself that its tokenizer.json is all there is to it.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")

# What classes rebuild differently: spaces, blank lines, indents, digits, accents in both forms, other scripts.
PROBE = 'Add 9 and 16.\n\nSo it is 25:\n    x_1 = "\\frac{1}{2}"; \tna\u00efve, nai\u0308ve, 数学。 Итого - 3,5 %\n'


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a Hub id, as its `tokenizer.json` says.

    `AutoTokenizer` may choose the class by the model type or by a name in `tokenizer_config.json` and rebuild the
    tokenizer from its vocabulary: a byte-level file under a Llama class loses its spaces and blank lines, a word-level
    file beside a Qwen2 model encodes every text to nothing. So where the config names the generic class, or a class
    does not reproduce the file on a probe text, the file is read as it stands.

    Args:
        path: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: if there is no tokenizer.
    """
    kwargs = {"revision": revision} if revision else {}
    generic = get_tokenizer_config(str(path), **kwargs).get("tokenizer_class") in GENERIC_TOKENIZERS
    tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(str(path), **kwargs)
    file = cached_file(str(path), "tokenizer.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    if file and not generic and not read_alike(tokenizer, PreTrainedTokenizerFast(tokenizer_file=file)):
        name = type(tokenizer).__name__
        logger.warning("%s: %s does not reproduce tokenizer.json, which is read as it stands.", path, name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers encode the probe text alike and decode it alike."""
    ids = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (first, second)]
    texts = [tokenizer.decode(ids[1], clean_up_tokenization_spaces=False) for tokenizer in (first, second)]
    return ids[0] == ids[1] and texts[0] == texts[1]


# Models and adapters ---------------------------------------------------------------------------------


def is_adapter(model: str) -> bool:
    """Whether a folder or Hub id holds an adapter; what cannot be read holds none."""
    try:
        return find_adapter_config_file(model) is not None
    except OSError:
        return False


def base_model_of(model: str) -> str | None:
    """The model that a LoRA adapter was trained on, `None` for a model that is no adapter.

    Raises:
        ValueError: if the adapter does not name its base model.
    """
    if not is_adapter(model):
        return None
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise ValueError(
            f"model={model!r} is an adapter that names no base model; set base_model_name_or_path in its "
            "adapter_config.json."
        )
    return base


def refuse_adapter(model: str, field: str) -> None:
    """Refuse an adapter where a whole model is needed.

    Args:
        model: folder or Hub id.
        field: the setting that names it, for the message.

    Raises:
        ValueError: if it is an adapter, with how to make a model of it.
    """
    if is_adapter(model):
        raise ValueError(
            f"{field}={model!r} is an adapter of {base_model_of(model)!r}, no model; merge it with `from "
            "attn_trainers.sampling.models import load_model, tokenizer_of`, "
            f"`load_model({model!r}, 'auto').save_pretrained(FOLDER)` and "
            f"`tokenizer_of({model!r}).save_pretrained(FOLDER)`, and set {field} to FOLDER."
        )


def load_config(model: str) -> PretrainedConfig:
    """The config of a model, or of an adapter's base model.

    Raises:
        ValueError: if it cannot be read, saying of which model.
    """
    base = base_model_of(model)
    try:
        return AutoConfig.from_pretrained(base or model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if base is not None:
            raise ValueError(
                f"model={model!r} is an adapter of {base!r}, which cannot be read ({reason}); put that model there, "
                "or correct base_model_name_or_path in adapter_config.json."
            ) from error
        raise ValueError(
            f"model={model!r} cannot be read ({reason}); give a folder that holds a model or an adapter, or a Hub id."
        ) from error


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model was made for, prompt and completion together; `None` where the config sets no limit.

    Of the scaled rotary embeddings, those that stretch all positions alike ("linear", "dynamic") leave the unscaled
    number in the config; the others state the scaled one, as vLLM takes it too.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions is not None and rope.get("rope_type") in ("linear", "dynamic"):
        return int(positions * rope.get("factor", 1.0))
    return positions


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model or adapter, else that of the adapter's base model."""
    base = base_model_of(model)
    if base is not None and not (Path(model) / "tokenizer_config.json").exists():
        return load_tokenizer(base)
    return load_tokenizer(model)


# Instructions without which a CPU converts numbers of a dtype, and takes several times as long as with float32.
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a CPU is to compute in with weights of a dtype: that, or float32 where it has no instructions for it."""
    has = torch.cpu.get_capabilities()
    slow = dtype in _INSTRUCTIONS and not any(has.get(name) for name in _INSTRUCTIONS[dtype])
    return torch.float32 if slow else dtype


def computed_dtype(model: str, dtype: str) -> str:
    """`dtype` of the model with "auto" resolved on a CPU, where it is the dtype of the saved weights (`cpu_dtype`)."""
    if dtype != "auto" or torch.cuda.is_available():
        return dtype
    saved = getattr(AutoConfig.from_pretrained(model).get_text_config(), "dtype", None)
    return str(cpu_dtype(saved or torch.float32)).removeprefix("torch.")


def load_model(model: str, dtype: str) -> PreTrainedModel:
    """A model for generation; an adapter is merged into its base model.

    Args:
        model: model or adapter.
        dtype: "auto" (`computed_dtype`), "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for an adapter of a kind that cannot be merged.
    """
    base = base_model_of(model)
    loaded = AutoModelForCausalLM.from_pretrained(base or model, dtype=computed_dtype(base or model, dtype))
    if base is not None:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(loaded, model)
        kind = adapted.peft_config["default"].peft_type.value
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise ValueError(
                f"model={model!r} is an adapter of type {kind}, which cannot be merged into {base!r}; give a LoRA "
                "adapter or a whole model."
            )
        loaded = adapted.merge_and_unload()
    return loaded.eval()


def end_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the generation config (else of the config) and the tokenizer's own."""
    base = base_model_of(model) or model
    try:
        ids = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:  # the model has no generation config
        ids = AutoConfig.from_pretrained(base).eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@contextmanager
def merged_model(model: str, dtype: str) -> Iterator[str]:
    """Path of a model that vLLM can load: an adapter is merged into its base model in a temporary folder."""
    if base_model_of(model) is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        load_model(model, dtype).save_pretrained(folder)
        yield folder
