"""Which KV pages hold which beginnings of prompts.

A full page of 64 tokens is named by the chain key of all tokens up to its end, so equal keys mean equal prefixes, and what a
key points to was computed from exactly those tokens. Keys are 128-bit BLAKE2b digests that begin with the request's salt:
requests of different salts never meet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from backend.engine.plan import PAGE_TOKENS

Key = bytes
_KEY_BYTES = 16


def root_key(salt: str) -> Key:
    """The key of the empty prefix for one salt."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES, person=b"prefix").digest()


def next_key(key: Key, token_ids: Sequence[int]) -> Key:
    """The key of a prefix that is one full page longer; `token_ids` are that page's."""
    assert len(token_ids) == PAGE_TOKENS, f"a page has {PAGE_TOKENS} tokens, got {len(token_ids)}"
    return hashlib.blake2b(key + array("i", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class PrefixCache:
    """The index from keys to pages. Who refers to the pages is the PagePool's business."""

    def __init__(self) -> None:
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Pages of the longest known prefix; `keys` are those of a prompt's full pages in order."""
        pages = []
        for key in keys:
            page_id = self._pages.get(key)
            if page_id is None:
                break
            pages.append(page_id)
        self.num_queried_tokens += len(keys) * PAGE_TOKENS
        self.num_hit_tokens += len(pages) * PAGE_TOKENS
        return pages

    def add(self, key: Key, page_id: int) -> bool:
        """Name a full page; False when another page already has this content (then it stays unnamed)."""
        if key in self._pages or page_id in self._keys:
            return False
        self._pages[key] = page_id
        self._keys[page_id] = key
        return True

    def forget(self, page_id: int) -> None:
        """Drop a page that is taken for something else."""
        del self._pages[self._keys.pop(page_id)]
