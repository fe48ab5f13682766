"""Our Tokenizer in the shape that mistral-common's chat templates expect of one.

mistral-common's own Tekkenizer could be filled from the vocabulary too, but that takes half a second and keeps a second
copy of all ranks; and here every text that a template makes passes the same checks as raw text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, TokenizerVersion
from mistral_common.tokens.tokenizers.base import Tokenizer as TokenizerInterface
from mistral_common.tokens.tokenizers.model_settings_builder import ModelSettingsBuilder

from backend.text.tokenizer import Tokenizer


class TemplateTokenizer(TokenizerInterface):
    """Tekken of version 3; RequestError("messages", ...) for text that cannot be encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Turn text into ids, with the ids of beginning and end as asked."""
        ids = self._tokenizer.encode(s, add_bos=bos, field="messages")
        return [*ids, self.eos_id] if eos else ids

    def decode(self, tokens: list[int], special_token_policy: SpecialTokenPolicy = SpecialTokenPolicy.IGNORE) -> str:
        """Turn ids into text; special tokens have none, have their names, or are refused, as the policy says."""
        if special_token_policy == SpecialTokenPolicy.IGNORE:
            return self._tokenizer.decode(tokens)
        special = [token for token in tokens if self.is_special(token)]
        if special and special_token_policy == SpecialTokenPolicy.RAISE:
            raise ValueError(f"ids to decode must not be special but {special[0]} is")
        return self._to_string(tokens)

    def _to_string(self, tokens: list[int]) -> str:
        texts: list[str] = []
        start = 0
        for index, token in enumerate(tokens):
            if self.is_special(token):
                texts += [self._tokenizer.decode(tokens[start:index]), self._vocabulary.special_tokens[token]]
                start = index + 1
        return "".join(texts) + self._tokenizer.decode(tokens[start:])

    def id_to_piece(self, token_id: int) -> str:
        """Name of a special token, text of any other."""
        return self._to_string([token_id])

    def vocab(self) -> list[str]:
        """Return all tokens as text, in the order of ids."""
        return [self.id_to_piece(token_id) for token_id in range(self.n_words)]

    def get_special_token(self, s: str) -> int:
        """Id of the special token of that name; ConfigError if there is none."""
        return self._vocabulary.special_id(s)

    def is_special(self, token: int | np.integer[Any] | str) -> bool:
        """Whether an id or a name is that of a special token."""
        if isinstance(token, str):
            return token in self._vocabulary.special_tokens
        return 0 <= int(token) < self._vocabulary.num_special_tokens

    @property
    def n_words(self) -> int:
        """Number of token ids."""
        return self._vocabulary.vocab_size

    @property
    def num_special_tokens(self) -> int:
        """Number of special tokens, which have the lowest ids."""
        return self._vocabulary.num_special_tokens

    @property
    def special_ids(self) -> set[int]:
        """Ids of all special tokens."""
        return set(range(self._vocabulary.num_special_tokens))

    @property
    def bos_id(self) -> int:
        """Id of the beginning of a sequence."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int:
        """Id of the end of a sequence."""
        return self._vocabulary.eos_id

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self._vocabulary.pad_id

    @property
    def unk_id(self) -> int:
        """Id of the unknown token, which byte-level text never needs."""
        return self._vocabulary.unk_id

    @property
    def version(self) -> TokenizerVersion:
        """The template's version, that of Mistral NeMo."""
        return TokenizerVersion.v3

    @property
    def model_settings_builder(self) -> ModelSettingsBuilder | None:
        """Version 3 has no model settings."""
        return None

    @property
    def file_path(self) -> Path:
        """There is none: ValueError, as from mistral-common's own tokenizers made in memory."""
        raise ValueError("this tokenizer was made in memory")
