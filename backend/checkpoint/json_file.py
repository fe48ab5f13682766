"""JSON files of a checkpoint, decoded straight into the types that say what they must hold."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from backend.checkpoint.json_object import read_json_bytes
from backend.errors import ConfigError, one_line

_Decoded = TypeVar("_Decoded")


def read_json(path: Path, kind: type[_Decoded]) -> _Decoded:
    """Read a file as `kind`; ConfigError names the file and, where the content does not fit, the place in it."""
    return decode_json(path, read_json_bytes(path), kind)


def decode_json(path: Path, content: bytes | msgspec.Raw, kind: type[_Decoded]) -> _Decoded:
    """Decode JSON that came from `path`; ConfigError as in `read_json`."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:  # ValidationError is a DecodeError
        raise ConfigError(f"{path}: {one_line(str(error))}") from error
