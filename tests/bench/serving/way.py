"""What a way of serving looks like to the load: our engine alone, Triton, a peer."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class ServingError(RuntimeError):
    """A request failed, or what serves is gone."""


class Progress(NamedTuple):
    """New tokens of one request at `at_s` of time.perf_counter, or none, and whether they were its last."""

    handle: int
    num_tokens: int
    at_s: float
    is_end: bool


class Way(Protocol):
    """Takes requests by handles that are never used twice, and says how they get on."""

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Begin a request of exactly `max_tokens` sampled tokens, whatever they are."""

    def take_back(self, handle: int) -> None:
        """Drop a request; what it still says is passed over."""

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        """What has come since the last call, waiting for something at most so long; ServingError when a request failed."""

    def wait_until_idle(self) -> None:
        """Return when nothing of what was taken back runs any more; ServingError when that does not come."""

    def close(self) -> None:
        """End what serves."""


class ProgressQueue:
    """Progress that other threads put, several at a time, and the load takes."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Sequence[Progress] | Exception] = queue.SimpleQueue()

    def put(self, news: Sequence[Progress] | Exception) -> None:
        """From any thread; an exception is raised where the load takes."""
        self._queue.put(news)

    def take(self, timeout_s: float) -> list[Progress]:
        """All there is, waiting for the first at most so long."""
        taken: list[Progress] = []
        try:
            news = self._queue.get(timeout=max(0.0, timeout_s))
            while True:
                if isinstance(news, Exception):
                    raise news
                taken += news
                news = self._queue.get_nowait()
        except queue.Empty:
            return taken
