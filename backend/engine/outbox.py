"""The engine's way out: messages to the owner, written in a thread of their own, so that a slow owner never holds up a step.

What the owner has not taken yet is joined: one event for each sequence, the latest stats. So what waits is bounded by the
sequences there are, however fast the device and however slow the owner; with a bound on joining, by what the scheduler lets
streams be ahead of their clients (`max_unsent_tokens`).
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from multiprocessing.connection import Connection

from backend.engine import messages
from backend.engine.events import EngineStats, Event, RequestFailed, TokenEvent
from backend.engine.joined_event import JoinedEvent

_STATS_PERIOD_S = 0.1
MOST_EVENTS = 512
"""Events in one message, when more wait: neither side is to be busy with a single message for long."""


class WaitingStep:
    """Steps joined into one. An event of a sequence is joined to the one that waits, which moves behind all others.

    So the last event of a request stays behind those of its other sequences. Nothing is joined behind an event that is closed,
    nor beyond `max_tokens` ids (0: no bound).
    """

    def __init__(self, step: messages.Step, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._first_stats = step.stats
        self._failed: list[RequestFailed] = []
        self._waiting: OrderedDict[int, JoinedEvent | TokenEvent] = OrderedDict()
        self._num_seen = 0
        self._last: dict[tuple[int, int], int] = {}
        self.join(step)

    def join(self, step: messages.Step) -> None:
        """Add the step behind."""
        for event in step.tokens:
            sequence = (event.handle, event.sequence_index)
            key = self._last.get(sequence)
            before = None if key is None else self._waiting[key]
            if key is None or before is None or before.is_closed or self._is_full(before, event):
                self._waiting[self._num_seen] = event
            else:
                del self._waiting[key]
                if isinstance(before, TokenEvent):
                    first, before = before, JoinedEvent(*sequence)
                    before.join(first)
                before.join(event)
                self._waiting[self._num_seen] = before
            self._last[sequence] = self._num_seen
            self._num_seen += 1
        self._failed += step.failed
        self._stats = step.stats

    def take(self) -> tuple[messages.Step, bool]:
        """The first MOST_EVENTS events as one step, and whether anything is left; failures and the load come with the last."""
        tokens: list[TokenEvent] = []
        while self._waiting and len(tokens) < MOST_EVENTS:
            key, event = self._waiting.popitem(last=False)
            if self._last[event.handle, event.sequence_index] == key:
                del self._last[event.handle, event.sequence_index]
            tokens.append(event if isinstance(event, TokenEvent) else event.event())
        if self._waiting:
            return messages.Step(tuple(tokens), (), self._first_stats), True
        return messages.Step(tuple(tokens), tuple(self._failed), self._stats), False

    def _is_full(self, before: JoinedEvent | TokenEvent, event: TokenEvent) -> bool:
        return 0 < self._max_tokens < len(before.token_ids) + len(event.token_ids)


class MessageQueue:
    """Messages in order, with at most one step and one sign of life among them; not safe to share between threads."""

    def __init__(self, max_tokens_per_event: int = 0) -> None:
        self._max_tokens = max_tokens_per_event
        self._others: deque[messages.FromEngine] = deque()
        self._alive: messages.Alive | None = None
        self._step: messages.Step | WaitingStep | None = None
        self._fatal: messages.Fatal | None = None

    def __bool__(self) -> bool:
        return bool(self._others or self._alive or self._step or self._fatal)

    def put(self, message: messages.FromEngine) -> None:
        """Add a message behind what waits."""
        if isinstance(message, messages.Step):
            if self._step is None:
                self._step = message
            else:
                if isinstance(self._step, messages.Step):
                    self._step = WaitingStep(self._step, self._max_tokens)
                self._step.join(message)
        elif isinstance(message, messages.Alive):
            self._alive = message
        elif isinstance(message, messages.Fatal):
            self._fatal = message
        else:
            self._others.append(message)

    def take(self) -> messages.FromEngine:
        """The next message: those of the start come before any step, and the end comes behind all; IndexError when empty."""
        message: messages.FromEngine
        if self._others:
            return self._others.popleft()
        if self._alive is not None:
            message, self._alive = self._alive, None
        elif self._step is not None:
            if isinstance(self._step, messages.Step):
                message, self._step = self._step, None
            else:
                message, has_more = self._step.take()
                self._step = self._step if has_more else None
        elif self._fatal is not None:
            message, self._fatal = self._fatal, None
        else:
            raise IndexError("no message waits")
        return message


class Outbox:
    """Owns the queue and the thread that writes it; `max_tokens_per_event` as in WaitingStep."""

    def __init__(self, connection: Connection, max_tokens_per_event: int = 0) -> None:
        self._connection = connection
        self._queue = MessageQueue(max_tokens_per_event)
        self._changed = threading.Condition()
        self._is_closing = False
        self._last_stats: EngineStats | None = None
        self._last_stats_s = 0.0
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def put(self, message: messages.FromEngine) -> None:
        """Queue one message."""
        with self._changed:
            self._queue.put(message)
            self._changed.notify()

    def put_step(self, events: list[Event], stats: EngineStats) -> None:
        """Queue the events of one turn; a turn without events is told only when the engine's load changed, ten times a second."""
        now_s = time.monotonic()
        is_idle = stats.num_requests_running == stats.num_requests_waiting == 0
        is_news = stats != self._last_stats and (is_idle or now_s - self._last_stats_s >= _STATS_PERIOD_S)
        if not events and not is_news:
            return
        self._last_stats, self._last_stats_s = stats, now_s
        self.put(messages.Step.of(events, stats))

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closing)
                if not self._queue:
                    return
                message = self._queue.take()
            try:
                messages.send(self._connection, message)
            except OSError:
                os._exit(1)  # the owner is gone: nobody is left to serve
