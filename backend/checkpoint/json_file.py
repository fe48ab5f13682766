"""JSON files of a checkpoint, decoded straight into the types that say what they must hold."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from backend.checkpoint.json_object import refuse_lfs_pointer
from backend.errors import ConfigError

_Decoded = TypeVar("_Decoded")


def read_json(path: Path, kind: type[_Decoded]) -> _Decoded:
    """Read a file as `kind`; ConfigError names the file and, where the content does not fit, the place in it."""
    try:
        refuse_lfs_pointer(path)
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_json(path, content, kind)


def decode_json(path: Path, content: bytes | msgspec.Raw, kind: type[_Decoded]) -> _Decoded:
    """Decode JSON that came from `path`; ConfigError as in `read_json`."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
        raise ConfigError(f"{path}: {error}") from error
