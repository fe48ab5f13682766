"""What has to be sent for one sequence: events of the engine, joined until a response can carry them.

A response costs the same with one token or with twenty. When responses go out more slowly than tokens come in, tokens that
came meanwhile share one.
"""

from __future__ import annotations

from backend.engine.events import TokenEvent
from backend.engine.joined_event import JoinedEvent


class PendingQueue:
    """Pending responses of all sequences of a request, in the order they must be sent.

    `is_streamed` False: each sequence collects everything until it ends, and `take` gives nothing before. `max_tokens` bounds
    what is joined into one response of a stream; an event is never cut, and 0 means no bound.
    """

    def __init__(self, *, is_streamed: bool, max_tokens: int = 0) -> None:
        self._is_streamed = is_streamed
        self._max_tokens = max_tokens
        self._queue: list[JoinedEvent] = []
        self._open: dict[int, JoinedEvent] = {}

    def add(self, event: TokenEvent) -> bool:
        """Join an event to what is open, or open a new response; returns whether `take` would give something."""
        pending = self._open.get(event.sequence_index)
        if pending is None or (self._is_streamed and (pending.is_closed or self._is_full(pending, event))):
            pending = self._open[event.sequence_index] = JoinedEvent(event.handle, event.sequence_index)
            if self._is_streamed:
                self._queue.append(pending)
        pending.join(event)
        if pending.finish is not None and not self._is_streamed:
            self._queue.append(pending)
        return bool(self._queue)

    def _is_full(self, pending: JoinedEvent, event: TokenEvent) -> bool:
        return 0 < self._max_tokens < len(pending.token_ids) + len(event.token_ids)

    @property
    def has_more(self) -> bool:
        """Whether `take` left something."""
        return bool(self._queue)

    def take(self, *, everything: bool = False) -> list[JoinedEvent]:
        """What may be sent now, in order: all of it, but one response at a time of a stream with a bound, which has many."""
        num_taken = 1 if self._max_tokens and not everything else len(self._queue)
        taken, self._queue = self._queue[:num_taken], self._queue[num_taken:]
        if self._is_streamed:
            self._open.clear()
        return taken
