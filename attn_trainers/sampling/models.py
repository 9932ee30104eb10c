"""Loading of tokenizers, and a small byte-level model made on the spot, to try things without a download."""

from pathlib import Path

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config


# Names under which a tokenizer says of itself that its tokenizer.json is all there is to it.
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a Hub id.

    `AutoTokenizer` may choose the class by the model type and rebuild the tokenizer from its vocabulary, which for
    another algorithm (a word-level file beside a Qwen2 model) encodes every text to nothing. So where
    `tokenizer_config.json` names the generic class, `tokenizer.json` is read as it stands.

    Args:
        path: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        OSError: if there is no tokenizer.
    """
    kwargs = {"revision": revision} if revision else {}
    generic = get_tokenizer_config(str(path), **kwargs).get("tokenizer_class") in GENERIC_TOKENIZERS
    tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(str(path), **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
