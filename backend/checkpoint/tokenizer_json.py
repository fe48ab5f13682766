"""Hugging Face's `tokenizer.json` of the Tekken tokenizer, turned back into Tekken ranks.

The file is a byte-level BPE with a list of merges; Tekken merges by rank. Both are the same function of the text if the
words are cut by the same pattern and the merges are all the splits of all tokens in the order of their ranks: that is
checked, so that no id can differ from Mistral's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from backend.checkpoint.json_file import decode_json, read_json
from backend.errors import ConfigError, shown

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_TOKEN_BYTES = 1024
"""Tekken's longest has 78; all splits of a token are tried, so that a long one would take for ever."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    model: msgspec.Raw
    added_tokens: list[_AddedToken]
    pre_tokenizer: Any
    normalizer: Any = None


class _ModelKind(msgspec.Struct):
    type: str


class _BytePairModel(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]


def read_tokenizer_json(path: Path) -> tuple[list[bytes], list[str]]:
    """Return the bytes of every rank and the names of the special tokens (ids 0 .. n - 1; id = rank + n).

    ConfigError says which check failed when the file is damaged or is not the Tekken tokenizer.
    """
    file = read_json(path, _TokenizerFile)
    kind = decode_json(path, file.model, _ModelKind).type
    if kind != "BPE":
        raise ConfigError(f"{path}: model.type must be 'BPE' but is {shown(kind)}")
    model = decode_json(path, file.model, _BytePairModel)
    if file.normalizer is not None:
        raise ConfigError(
            f"{path}: normalizer must be null, as Tekken changes no text, but is {shown(file.normalizer)}"
        )
    _check_pre_tokenizer(path, file.pre_tokenizer)

    num_added = len(file.added_tokens)
    name_of = {token.id: token.content for token in file.added_tokens}
    for token_id in range(num_added):
        if token_id not in name_of:
            raise ConfigError(
                f"{path}: the {num_added} added_tokens must have the ids 0 to {num_added - 1} but none has {token_id} "
                f"(the highest is {max(name_of)})"
            )
    special_tokens = [name_of[token_id] for token_id in range(num_added)]

    num_ranks = max(model.vocab.values(), default=-1) + 1 - len(special_tokens)
    if num_ranks > len(model.vocab):
        raise ConfigError(
            f"{path}: model.vocab has {len(model.vocab)} entries but ids up to {max(model.vocab.values())}"
        )
    ranks: list[bytes | None] = [None] * num_ranks
    rank_of: dict[str, int] = {}
    for token_text, token_id in model.vocab.items():
        if len(token_text) > MAX_TOKEN_BYTES:
            raise ConfigError(
                f"{path}: model.vocab must have tokens of at most {MAX_TOKEN_BYTES} bytes, found {len(token_text)} "
                f"for id {token_id}"
            )
        rank = token_id - len(special_tokens)
        if rank >= 0:
            ranks[rank] = _bytes_of(path, token_text)
            rank_of[token_text] = rank
        elif token_id < 0 or special_tokens[token_id] != token_text:
            raise ConfigError(f"{path}: model.vocab gives {shown(token_text)} the id {token_id} of another added token")
    if len(rank_of) > len(ranks):
        raise ConfigError(f"{path}: model.vocab has {len(rank_of)} tokens with only {len(ranks)} different ids")
    if None in ranks:
        raise ConfigError(f"{path}: model.vocab has no token of id {ranks.index(None) + len(special_tokens)}")
    _check_merges(path, model.merges, rank_of)
    return [token for token in ranks if token is not None], special_tokens


def _check_pre_tokenizer(path: Path, pre_tokenizer: object) -> None:
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            if pattern != TEKKEN_PATTERN:
                raise ConfigError(f"{path}: the Split pattern of pre_tokenizer is not Tekken's: {shown(pattern)}")
        case _:
            raise ConfigError(
                f"{path}: pre_tokenizer must be Tekken's Split followed by ByteLevel but is {shown(pre_tokenizer)}"
            )


def _check_merges(path: Path, merges: Sequence[str | tuple[str, str]], rank_of: dict[str, int]) -> None:
    """Check that merging by this list is merging by rank: it has every split of every token, in the order of ranks."""
    merged_ranks: list[int] = []
    pairs: set[tuple[str, str]] = set()
    for merge in merges:
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        merged_rank = rank_of.get(left + right)
        if merged_rank is None or left not in rank_of or right not in rank_of:
            raise ConfigError(f"{path}: model.merges has {shown(merge)}, not all of which is in model.vocab")
        merged_ranks.append(merged_rank)
        pairs.add((left, right))
    for (_, before), (index, after) in pairwise(enumerate(merged_ranks)):
        if after < before:
            raise ConfigError(f"{path}: model.merges[{index}] {shown(merges[index])} is not in the order of token ids")
    num_splits = sum(
        token[:cut] in rank_of and token[cut:] in rank_of for token in rank_of for cut in range(1, len(token))
    )
    if len(pairs) != num_splits:
        raise ConfigError(
            f"{path}: model.merges has {len(pairs)} different pairs but the vocabulary has {num_splits}, so it would "
            f"not cut text as Tekken does; copy tekken.json from the model's original repository into the folder"
        )


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet undone: the character code that stands for a byte -> that byte as a Latin-1 character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = dict.fromkeys(hidden, "\U0010ffff")  # not in the alphabet: made unencodable, so that it is refused
    alphabet.update({byte: chr(byte) for byte in visible})
    alphabet.update({256 + index: chr(byte) for index, byte in enumerate(hidden)})
    return alphabet


_BYTE_ALPHABET = _byte_alphabet()


def _bytes_of(path: Path, token_text: str) -> bytes:
    try:
        return token_text.translate(_BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        raise ConfigError(f"{path}: model.vocab has {shown(token_text)}, which is no byte-level token") from None
