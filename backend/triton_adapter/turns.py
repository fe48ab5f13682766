"""Which stream gets the next response.

A response costs the same with one token or with fifty, and a thousand of them a second keep a core busy. So when sending takes
most of the sender's time and many streams have something to send, each waits until SPACING_S after its last response, and what
comes meanwhile shares the next: the processor makes tokens instead of messages, and the gaps of all streams become equal.
Otherwise nothing waits, and the first response of a stream never does.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import Generic, Protocol, TypeVar

NUM_CROWDED = 64
_BUSY_ABOVE, _BUSY_UNTIL = 0.6, 0.3
SPACING_S = 0.12


class Taker(Protocol):
    """A stream, as far as its turn is concerned."""

    is_due: bool
    has_sent: bool
    last_sent_s: float
    may_join: bool
    """Whether what comes later may share a response; otherwise waiting saves nothing."""


StreamT = TypeVar("StreamT", bound=Taker)


class Turns(Generic[StreamT]):
    """Streams that have something to send, each once; not safe to share between threads."""

    def __init__(self) -> None:
        self.is_busy = False
        self._first: deque[StreamT] = deque()
        self._next: deque[StreamT] = deque()
        self._spaced: list[tuple[float, int, StreamT]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._first) + len(self._next) + len(self._spaced)

    def observe(self, busy_share: float) -> None:
        """Take over which share of its time the sender has spent on sending of late."""
        self.is_busy = busy_share > (_BUSY_UNTIL if self.is_busy else _BUSY_ABOVE)

    def add(self, stream: StreamT, now_s: float) -> None:
        """Let a stream have its turn: before all others when it has sent nothing yet; it may be there already."""
        if stream.is_due:
            return
        stream.is_due = True
        ripe_s = stream.last_sent_s + SPACING_S
        if not stream.has_sent:
            self._first.append(stream)
        elif self.is_busy and stream.may_join and ripe_s > now_s and len(self) >= NUM_CROWDED:
            heapq.heappush(self._spaced, (ripe_s, next(self._numbers), stream))
        else:
            self._next.append(stream)

    def pop(self, now_s: float) -> StreamT | None:
        """Whose turn it is, if it is anybody's."""
        while self._spaced and self._spaced[0][0] <= now_s:
            self._next.append(heapq.heappop(self._spaced)[2])
        queue = self._first or self._next
        if not queue:
            return None
        stream = queue.popleft()
        stream.is_due = False
        return stream

    def wait_s(self, now_s: float) -> float:
        """Seconds until `pop` may give something that it does not give now; infinite when nobody waits for the time."""
        return max(0.0, self._spaced[0][0] - now_s) if self._spaced else float("inf")
