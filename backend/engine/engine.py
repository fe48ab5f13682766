"""The loop: one step ahead of the device, from the first day."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import NamedTuple

from backend.engine.events import EngineStats, FailureKind, RequestFailed
from backend.engine.plan import StepPlan
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Event, Scheduler
from backend.errors import QueueFull
from backend.runner.model_runner import InFlightStep, ModelRunner

Emit = Callable[[list[Event], EngineStats], None]


class Launched(NamedTuple):
    """A step on the device."""

    plan: StepPlan
    step: InFlightStep


class Engine:
    """Runs a Scheduler over a ModelRunner; other threads talk to it through its inbox alone.

    `emit` is called in the loop's thread with the events of a turn and how busy the engine is afterwards.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, emit: Emit) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._emit = emit
        self._inbox: queue.SimpleQueue[Callable[[], list[Event]] | None] = queue.SimpleQueue()
        self._is_stopping = False

    def submit(self, request: GenerationRequest) -> None:
        """Queue a validated request; it is answered through `emit`, a full queue too."""
        arrival_ns = time.monotonic_ns()
        self._inbox.put(lambda: self._add(request, arrival_ns))

    def abort(self, handle: int) -> None:
        """Take a request back, by the engine's own handle."""
        self._inbox.put(lambda: self._scheduler.abort(handle))

    def abort_request_id(self, request_id: str) -> None:
        """Take back every request that its client named `request_id`."""
        self._inbox.put(lambda: self._scheduler.abort_request_id(request_id))

    def abort_all(self) -> None:
        """Take everything back and go on serving."""
        self._inbox.put(self._scheduler.abort_all)

    def stop(self) -> None:
        """End `run` after the current turn."""
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until `stop`. An exception of the runner ends the loop: its state cannot be trusted afterwards."""
        in_flight: Launched | None = None
        while True:
            is_idle = in_flight is None and not self._scheduler.has_work
            events = self._drain_inbox(wait=is_idle)
            if self._is_stopping:
                return
            events += self._scheduler.expire(time.monotonic_ns())
            plan = self._scheduler.plan(time.monotonic_ns())
            launched = None if plan is None else Launched(plan, self._runner.launch(plan))
            if in_flight is not None:
                events += self._scheduler.commit(in_flight.plan, in_flight.step.result(), time.monotonic_ns())
            in_flight = launched
            if not self._scheduler.has_work:
                self._scheduler.check_integrity()
            self._emit(events, self._scheduler.stats())

    def _add(self, request: GenerationRequest, arrival_ns: int) -> list[Event]:
        try:
            self._scheduler.add(request, arrival_ns)
        except QueueFull as error:
            return [RequestFailed(request.handle, FailureKind.QUEUE_FULL, str(error))]
        return []

    def _drain_inbox(self, *, wait: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            try:
                order = self._inbox.get(block=wait)
            except queue.Empty:
                return events
            wait = False
            if order is None:
                self._is_stopping = True
                return events
            events += order()
