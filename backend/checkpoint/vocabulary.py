"""The Tekken vocabulary of a checkpoint folder: the bytes of every token id, and the special tokens by name.

    tekken.json      Mistral's own file, taken as it is
    tokenizer.json   Hugging Face's file of the same tokenizer: its vocabulary is turned back into Tekken ranks, after
                     checking that it really is the same function of the text

Every id below `num_special_tokens` is special and has no text; id = rank + `num_special_tokens` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from backend.checkpoint.json_file import read_json
from backend.checkpoint.tokenizer_json import MAX_TOKEN_BYTES, TEKKEN_PATTERN, read_tokenizer_json
from backend.errors import ConfigError, shown

TEKKEN_FILE = "tekken.json"
HUGGING_FACE_FILE = "tokenizer.json"

# What a v3 file without the key `special_tokens` means (ids 0, 1, 2, ...); the rest are unnamed.
V3_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)

_NUM_BYTES = 256
_MAX_SPECIAL_TOKENS = 100_000


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one checkpoint; the index into `token_bytes` and `special_tokens` is the token id.

    `token_bytes` has one entry per id (V of them) and b"" for every special token; `special_tokens` has the names of
    ids 0 .. num_special_tokens - 1; `pattern` is the regular expression that cuts text into words before merging.
    """

    token_bytes: tuple[bytes, ...] = field(repr=False)
    special_tokens: tuple[str, ...] = field(repr=False)
    pattern: str = field(repr=False)
    num_special_tokens: int
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    tool_calls_id: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self.token_bytes)

    def special_id(self, name: str) -> int:
        """Id of the special token `name`; ConfigError if the checkpoint has none of that name."""
        return _special_id(self.special_tokens, name)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read the vocabulary of a checkpoint folder, from `tekken.json` if there is one, else from `tokenizer.json`.

    ConfigError names the file, the field and the value when the folder has neither file, when a file is damaged, or
    when `tokenizer.json` is not the Tekken tokenizer.
    """
    if not folder.is_dir():
        raise ConfigError(f"checkpoint: {folder} is not a folder")
    if (folder / TEKKEN_FILE).is_file():
        return _read_tekken(folder / TEKKEN_FILE)
    if (folder / HUGGING_FACE_FILE).is_file():
        path = folder / HUGGING_FACE_FILE
        ranks, special_tokens = read_tokenizer_json(path)
        return _vocabulary(path, ranks, special_tokens, TEKKEN_PATTERN)
    sentence_piece = sorted(path.name for path in folder.glob("tokenizer.model*"))
    if sentence_piece:
        raise ConfigError(
            f"checkpoint: {folder / sentence_piece[0]} is a SentencePiece tokenizer, which is not supported; "
            f"Mistral NeMo uses Tekken: copy {TEKKEN_FILE} from the model's original repository into the folder"
        )
    raise ConfigError(
        f"checkpoint: {folder} has no tokenizer; it needs {TEKKEN_FILE} or {HUGGING_FACE_FILE}, as in the model's "
        "original repository"
    )


class _Rank(msgspec.Struct, gc=False):
    rank: int
    token_bytes: bytes


class _NamedToken(msgspec.Struct):
    rank: int
    token_str: str


class _TekkenConfig(msgspec.Struct):
    pattern: str
    num_vocab_tokens: int
    default_vocab_size: int
    default_num_special_tokens: int
    version: str


class _TekkenFile(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_Rank]
    special_tokens: list[_NamedToken] | None = None


def _read_tekken(path: Path) -> Vocabulary:
    tekken = read_json(path, _TekkenFile)
    config = tekken.config
    if config.version != "v3":
        raise ConfigError(
            f"{path}: config.version must be 'v3', the version of Mistral NeMo, but is {shown(config.version)}"
        )
    if config.pattern != TEKKEN_PATTERN:  # it cuts every text of every client: another one may take for ever on some
        raise ConfigError(f"{path}: config.pattern is not Tekken's: {shown(config.pattern)}")
    if config.num_vocab_tokens != len(tekken.vocab):
        raise ConfigError(
            f"{path}: config.num_vocab_tokens is {config.num_vocab_tokens} but vocab has {len(tekken.vocab)} entries"
        )
    num_special_tokens = config.default_num_special_tokens
    if not 1 <= num_special_tokens <= _MAX_SPECIAL_TOKENS:
        raise ConfigError(
            f"{path}: config.default_num_special_tokens must be 1 to {_MAX_SPECIAL_TOKENS} but is {num_special_tokens}"
        )
    num_ranks = config.default_vocab_size - num_special_tokens
    if not _NUM_BYTES <= num_ranks <= len(tekken.vocab):
        raise ConfigError(
            f"{path}: config.default_vocab_size must be {num_special_tokens + _NUM_BYTES} to "
            f"{num_special_tokens + len(tekken.vocab)} (special tokens and ranks) but is {config.default_vocab_size}"
        )
    for index, entry in enumerate(tekken.vocab):
        if entry.rank != index:
            raise ConfigError(f"{path}: vocab[{index}].rank must be {index} but is {entry.rank}")
    return _vocabulary(
        path,
        ranks=[entry.token_bytes for entry in tekken.vocab[:num_ranks]],
        special_tokens=_tekken_special_tokens(path, tekken.special_tokens, num_special_tokens),
        pattern=config.pattern,
    )


def _tekken_special_tokens(path: Path, tokens: list[_NamedToken] | None, num_special_tokens: int) -> list[str]:
    if tokens is None:
        names = list(V3_SPECIAL_TOKENS[:num_special_tokens])
    else:
        for index, token in enumerate(tokens):
            if token.rank != index:
                raise ConfigError(f"{path}: special_tokens[{index}].rank must be {index} but is {token.rank}")
        names = [token.token_str for token in tokens]
    if len(names) > num_special_tokens:
        raise ConfigError(
            f"{path}: special_tokens has {len(names)} entries but config.default_num_special_tokens is "
            f"{num_special_tokens}"
        )
    return names + [f"<SPECIAL_{index}>" for index in range(len(names), num_special_tokens)]


def _vocabulary(path: Path, ranks: Sequence[bytes], special_tokens: Sequence[str], pattern: str) -> Vocabulary:
    rank_of: dict[bytes, int] = {}
    for rank, token in enumerate(ranks):
        if rank < _NUM_BYTES and token != bytes([rank]):
            raise ConfigError(
                f"{path}: the token of rank {rank} must be the byte {bytes([rank])!r} but is {shown(token)}"
            )
        if not 1 <= len(token) <= MAX_TOKEN_BYTES:
            raise ConfigError(
                f"{path}: the token of rank {rank} must have 1 to {MAX_TOKEN_BYTES} bytes but has {len(token)}"
            )
        if rank_of.setdefault(token, rank) != rank:
            raise ConfigError(f"{path}: ranks {rank_of[token]} and {rank} are the same token {shown(token)}")
    if len(rank_of) < _NUM_BYTES:
        raise ConfigError(f"{path}: the vocabulary must have at least {_NUM_BYTES} ranks but has {len(rank_of)}")
    id_of: dict[str, int] = {}
    for token_id, name in enumerate(special_tokens):
        if id_of.setdefault(name, token_id) != token_id:
            raise ConfigError(f"{path}: ids {id_of[name]} and {token_id} are the same special token {shown(name)}")
    return Vocabulary(
        token_bytes=(b"",) * len(special_tokens) + tuple(rank_of),
        special_tokens=tuple(special_tokens),
        pattern=pattern,
        num_special_tokens=len(special_tokens),
        unk_id=_special_id(special_tokens, "<unk>", path),
        bos_id=_special_id(special_tokens, "<s>", path),
        eos_id=_special_id(special_tokens, "</s>", path),
        pad_id=_special_id(special_tokens, "<pad>", path),
        tool_calls_id=_special_id(special_tokens, "[TOOL_CALLS]", path),
    )


def _special_id(special_tokens: Sequence[str], name: str, path: Path | None = None) -> int:
    if name not in special_tokens:
        raise ConfigError(f"{path or 'vocabulary'}: no special token is called {name!r}")
    return special_tokens.index(name)
