"""How many chunks are on their way from `mistral_nemo` to `postprocessing`, and when there are enough of them.

Triton queues them without a bound and without telling. What waits there can no longer be joined with what comes after it, and a
new request's first response has to wait behind it. So chunks are numbered, postprocessing writes down the number it saw last, in
four bytes of a file that both map into memory, and the engine's side sends no more while MOST_CHUNKS are under way.

The file lies in the supervisor's folder (presence.py); without a supervisor there is no bound.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from backend.triton_adapter.presence import RUN_DIR_VARIABLE

MOST_CHUNKS = 32
"""Enough to keep postprocessing busy for about 20 ms."""
_LOST_AFTER_S = 1.0
_MOST_PLAUSIBLE = 2**16
"""Anything beyond says nothing: clients may send chunks to postprocessing by hand, and what answers `stop` has no number."""
_FILE = "last_chunk_seen"
_NUMBER = struct.Struct("=i")
_MODULUS = 2**31


def _map_file() -> mmap.mmap | None:
    folder = os.environ.get(RUN_DIR_VARIABLE)
    if not folder:
        return None
    descriptor = os.open(Path(folder, _FILE), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, _NUMBER.size)
        return mmap.mmap(descriptor, _NUMBER.size)
    finally:
        os.close(descriptor)


class SeenChunks:
    """Postprocessing's side."""

    def __init__(self) -> None:
        self._memory = _map_file()

    def note(self, number: int) -> None:
        """The chunk with this number has arrived; only a number that comes soon behind the last one counts."""
        if self._memory is not None and 0 < (number - _last_seen(self._memory)) % _MODULUS < _MOST_PLAUSIBLE:
            _NUMBER.pack_into(self._memory, 0, number)


class ChunkWindow:
    """The engine's side; used by one thread. Numbers go on where those of an earlier engine ended."""

    def __init__(self) -> None:
        self._memory = _map_file()
        self._seen = self._sent = 0 if self._memory is None else _last_seen(self._memory)
        self._seen_at_s = 0.0

    def next_number(self) -> int:
        """The number of the chunk that is sent now."""
        self._sent = (self._sent + 1) % _MODULUS
        return self._sent

    def is_full(self, now_s: float) -> bool:
        """Whether to wait. Chunks that do not arrive for a second are given up: they were dropped, or postprocessing is gone."""
        if self._memory is None:
            return False
        seen = _last_seen(self._memory)
        is_full = MOST_CHUNKS <= (self._sent - seen) % _MODULUS < _MOST_PLAUSIBLE
        if seen != self._seen or not is_full:
            self._seen, self._seen_at_s = seen, now_s
        elif now_s - self._seen_at_s > _LOST_AFTER_S:
            _NUMBER.pack_into(self._memory, 0, self._sent)
            return False
        return is_full


def _last_seen(memory: mmap.mmap) -> int:
    number: int = _NUMBER.unpack_from(memory, 0)[0]
    return number
