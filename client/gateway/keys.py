"""Bearer keys: kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from client.gateway.settings import KEYS_VARIABLE

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_LEAST_CHARACTERS = 16


class ApiKeys:
    """The keys that may ask; without any, everybody may."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest_of(key) for key in keys]

    @classmethod
    def load(cls, file: str, environment: Mapping[str, str]) -> ApiKeys:
        """Keys of `file`, one a line (`#` begins a comment), and of the environment, separated by commas or blanks.

        ValueError for a key that is too short to be one; the message does not repeat it.
        """
        lines = Path(file).read_text().splitlines() if file else []
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        keys += environment.get(KEYS_VARIABLE, "").replace(",", " ").split()
        if file and not keys:
            raise ValueError(f"api_keys_file: {file!r} has no key")
        return cls(keys)

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._digests)

    def allow(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header bears one of the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Every digest is compared, so that the time says nothing about which one it is.
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        return scheme.lower() == "bearer" and any(found)


def _digest_of(key: str) -> bytes:
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    if len(key) < _LEAST_CHARACTERS or key.startswith("sha256:"):
        raise ValueError(
            f"api keys: each must have at least {_LEAST_CHARACTERS} characters, or be sha256: and 64 hexadecimal "
            f"digits; one has {len(key)} characters"
        )
    return hashlib.sha256(key.encode()).digest()
