"""What the text of single tokens decides: where lines begin, and which tokens are punctuation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """Texts of token ids, each decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        if token_id not in self._texts:
            self._texts[token_id] = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return self._texts[token_id]

    def line_starts(self, token_ids: Sequence[int]) -> Tensor:
        """Indices of the tokens that follow a token with a newline in it, ascending."""
        return torch.tensor([t + 1 for t, i in enumerate(token_ids[:-1]) if "\n" in self.text(i)], dtype=torch.long)

    def is_word(self, token_ids: Sequence[int]) -> Tensor:
        """Mask (n,): False for special tokens and those without a letter or digit (punctuation, white space)."""
        words = [i not in self._special and any(map(str.isalnum, self.text(i))) for i in token_ids]
        return torch.tensor(words, dtype=torch.bool)
