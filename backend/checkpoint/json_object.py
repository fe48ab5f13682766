"""A JSON file whose fields are read with their type and bounds checked, so that a wrong one is named with its file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, one_line, shown

LFS_MARKER = b"version https://git-lfs"
"""First bytes of the small text file that git leaves in place of a large one it did not download."""
MAX_JSON_BYTES = 256 * 2**20
"""The largest are tokenizers, of some 17 MB."""


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ConfigError when `path` is a Git-LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        start = file.read(len(LFS_MARKER))
    if start == LFS_MARKER:
        raise ConfigError(f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")


def read_json_bytes(path: Path) -> bytes:
    """The content of a JSON file; ConfigError when it cannot be read, is a Git-LFS pointer, or is larger than any such file."""
    try:
        refuse_lfs_pointer(path)
        num_bytes = path.stat().st_size
        if num_bytes > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: must have at most {MAX_JSON_BYTES} bytes, found {num_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class JsonObject:
    """The object at the top of a JSON file. A field that is null counts as missing, as in transformers."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """Parse the file; ConfigError when it cannot be read, is not JSON, or not an object."""
        content = read_json_bytes(path)
        try:
            values = json.loads(content.decode("utf-8"))
        except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
            raise ConfigError(f"{path}: not valid JSON ({one_line(str(error))}); download the file again") from error
        except RecursionError:
            raise ConfigError(f"{path}: not valid JSON (nested too deeply); download the file again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold a JSON object, found {type(values).__name__}")
        return cls(path, values)

    def child(self, name: str) -> JsonObject | None:
        """The object in field `name`, or None when it is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object", value)
        return None if value is None else JsonObject(self.path, value)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, low: int, high: int) -> int:
        """A required whole number in [low, high]."""
        value = self._required(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"must be a whole number in [{low}, {high}]", value)
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A required finite number in [low, high]."""
        value = self._required(name)
        # The comparison is false for NaN too.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(name, f"must be a number in [{low:g}, {high:g}]", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false, `default` when missing."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false", value)
        return value

    def error(self, name: str, rule: str, value: object) -> ConfigError:
        """The error that says file, field, rule and what was found."""
        return ConfigError(f"{self.path}: {name} {rule}, found {shown(value)}")

    def _required(self, name: str) -> Any:
        if not self.has(name):
            raise ConfigError(f"{self.path}: {name} is missing; it is required and never guessed")
        return self.values[name]
