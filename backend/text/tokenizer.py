"""Text to token ids and back, with tiktoken on the ranks of the checkpoint's own vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from backend.checkpoint.vocabulary import Vocabulary, read_vocabulary
from backend.errors import ConfigError, RequestError

# tiktoken's regular expression engine panics (an exception that is no Exception) on a run of 999,999 blanks or more:
# the lookahead in `\s+(?!\S)` takes one of its 1,000,000 stack entries per character. Line ends take another branch.
MAX_BLANK_RUN = 900_000
_BLANK_RUN = re.compile(r"[^\S\r\n]+")


class Tokenizer:
    """Encodes and decodes plain text; special tokens written out in a text are text like any other.

    Its ids are those of mistral-common's Tekkenizer. Immutable, so threads may share it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        ranks = vocabulary.token_bytes[vocabulary.num_special_tokens :]
        try:
            self._encoding = tiktoken.Encoding(
                "tekken",
                pat_str=vocabulary.pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                special_tokens={},
            )
        except ValueError as error:
            raise ConfigError(f"tokenizer: the pattern of the vocabulary cannot be used: {error}") from error

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Tokenizer:
        """Read the vocabulary of a checkpoint folder; ConfigError as in `read_vocabulary`."""
        return cls(read_vocabulary(folder))

    @property
    def bos_id(self) -> int:
        """Id of the token that begins every prompt."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every answer."""
        return self.vocabulary.eos_id

    def encode(self, text: str, *, add_bos: bool, field: str = "text_input") -> list[int]:
        """Turn text into token ids, with the beginning-of-sequence id in front if `add_bos`.

        RequestError (naming `field`) for text that is not Unicode (a lone surrogate) or has a run of more than
        `MAX_BLANK_RUN` blanks.
        """
        _refuse_surrogates(text, field)
        _refuse_blank_runs(text, field)
        num_special_tokens = self.vocabulary.num_special_tokens
        ids = [rank + num_special_tokens for rank in self._encoding.encode_ordinary(text)]
        return [self.vocabulary.bos_id, *ids] if add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn a whole sequence of ids into text.

        Bytes that are not UTF-8 become U+FFFD. A special token has no text and ends a character left unfinished before
        it. RequestError if an id is not in the vocabulary.
        """
        token_bytes = self.vocabulary.token_bytes
        texts: list[str] = []
        pieces: list[bytes] = []
        for token_id in ids:
            if not 0 <= token_id < len(token_bytes):
                raise RequestError("token_ids", f"must be 0 to {len(token_bytes) - 1} but one is {token_id}")
            pieces.append(token_bytes[token_id])
            if not pieces[-1]:
                texts.append(b"".join(pieces).decode("utf-8", errors="replace"))
                pieces.clear()
        return "".join(texts) + b"".join(pieces).decode("utf-8", errors="replace")


def _refuse_surrogates(text: str, field: str) -> None:
    # NOTE: tiktoken would encode U+FFFD in their place without a word.
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            field, f"is not Unicode text: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None


def _refuse_blank_runs(text: str, field: str) -> None:
    if len(text) <= MAX_BLANK_RUN:
        return
    for run in _BLANK_RUN.finditer(text):
        length = run.end() - run.start()
        if length > MAX_BLANK_RUN:
            raise RequestError(
                field, f"may have at most {MAX_BLANK_RUN} blanks in a row but has {length} at character {run.start()}"
            )
