"""Which stream gets the next response."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Taker(Protocol):
    """A stream, as far as its turn is concerned."""

    is_due: bool
    has_sent: bool


StreamT = TypeVar("StreamT", bound=Taker)


class Turns(Generic[StreamT]):
    """Streams that have something to send, each once, in the order they came. Not safe to share between threads.

    First responses stand in a line of their own, and every other turn is theirs: so a beginning does not wait behind hundreds of
    streams, and a crowd of beginnings does not hold those up for more than twice as long.
    """

    def __init__(self) -> None:
        self._first: deque[StreamT] = deque()
        self._next: deque[StreamT] = deque()
        self._was_first = False

    def __len__(self) -> int:
        return len(self._first) + len(self._next)

    def add(self, stream: StreamT) -> None:
        """Let a stream have its turn; it may be there already."""
        if not stream.is_due:
            stream.is_due = True
            (self._next if stream.has_sent else self._first).append(stream)

    def pop(self) -> StreamT | None:
        """Whose turn it is, if it is anybody's."""
        self._was_first = bool(self._first) and not (self._was_first and self._next)
        queue = self._first if self._was_first else self._next
        if not queue:
            return None
        stream = queue.popleft()
        stream.is_due = False
        return stream
