"""The loop: one step ahead of the device, from the first day."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from backend.engine.events import EngineStats, FailureKind, RequestFailed
from backend.engine.plan import StepPlan
from backend.engine.request import GenerationRequest, GuideSpec
from backend.engine.scheduler import Event, Scheduler
from backend.engine.sequence import Guide
from backend.errors import QueueFull, RequestError
from backend.runner.model_runner import InFlightStep, ModelRunner

Emit = Callable[[list[Event], EngineStats], None]
CompileGuide = Callable[[GuideSpec, int], Guide]


class Launched(NamedTuple):
    """A step on the device."""

    plan: StepPlan
    step: InFlightStep


class Engine:
    """Runs a Scheduler over a ModelRunner; other threads talk to it through its inbox alone.

    `emit` is called in the loop's thread with the events of a turn and how busy the engine is afterwards. `compile_guide` raises
    RequestError for a grammar that cannot be used, and gets the number of sequences that will follow it; without it every
    grammar is refused.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, emit: Emit, compile_guide: CompileGuide | None = None
    ) -> None:
        self._scheduler = scheduler
        self._compile_guide = compile_guide
        self._turn_started_s = 0.0
        self._busy_s = 0.0
        self._runner = runner
        self._emit = emit
        self._inbox: queue.SimpleQueue[Callable[[], list[Event]] | None] = queue.SimpleQueue()
        self._is_stopping = False

    def submit(self, request: GenerationRequest) -> None:
        """Queue a validated request; it is answered through `emit`, a full queue and a bad grammar too.

        The grammar is compiled here, in the caller's thread: a step need not wait for it.
        """
        arrival_ns = time.monotonic_ns()
        try:
            guide = self._guide_of(request)
        except RequestError as error:
            failed: list[Event] = [RequestFailed(request.handle, FailureKind.INVALID, str(error))]
            self._inbox.put(lambda: failed)
            return
        self._inbox.put(lambda: self._add(request, arrival_ns, guide))

    def abort(self, handle: int) -> None:
        """Take a request back, by the engine's own handle."""
        self._inbox.put(lambda: self._scheduler.abort(handle))

    def abort_request_id(self, request_id: str) -> None:
        """Take back every request that its client named `request_id`."""
        self._inbox.put(lambda: self._scheduler.abort_request_id(request_id))

    def abort_all(self) -> None:
        """Take everything back and go on serving."""
        self._inbox.put(self._scheduler.abort_all)

    @property
    def turn_age_s(self) -> float:
        """Seconds since the loop began its current turn; 0 while it waits for work."""
        started_s = self._turn_started_s
        return time.monotonic() - started_s if started_s else 0.0

    def stop(self) -> None:
        """End `run` after the current turn."""
        self._inbox.put(None)

    def run(self) -> None:
        """Serve until `stop`. An exception of the runner ends the loop: its state cannot be trusted afterwards."""
        in_flight: Launched | None = None
        while True:
            is_idle = in_flight is None and not self._scheduler.has_work
            self._turn_started_s = 0.0
            events = self._drain_inbox(wait=is_idle)
            if self._is_stopping:
                return
            self._turn_started_s = time.monotonic()
            events += self._scheduler.expire(time.monotonic_ns())
            plan = self._scheduler.plan(time.monotonic_ns())
            launched = None if plan is None else Launched(plan, self._runner.launch(plan))
            if launched is not None and not launched.plan.needs_masks:
                launched.step.draw({})
            if in_flight is not None:
                events += self._scheduler.commit(in_flight.plan, in_flight.step.result(), time.monotonic_ns())
            if launched is not None and launched.plan.needs_masks:
                launched.step.draw(self._scheduler.masks(launched.plan))
            in_flight = launched
            if not self._scheduler.has_work:
                self._scheduler.check_integrity()
            self._busy_s += time.monotonic() - self._turn_started_s
            self._emit(events, msgspec.structs.replace(self._scheduler.stats(), busy_s=self._busy_s))

    def _guide_of(self, request: GenerationRequest) -> Guide | None:
        if request.guide is None:
            return None
        if self._compile_guide is None:
            raise RequestError("guided_decoding_guide_type", "this runner cannot follow a grammar; leave it out")
        return self._compile_guide(request.guide, request.num_return_sequences)

    def _add(self, request: GenerationRequest, arrival_ns: int, guide: Guide | None) -> list[Event]:
        try:
            self._scheduler.add(request, arrival_ns, guide)
        except QueueFull as error:
            return [RequestFailed(request.handle, FailureKind.QUEUE_FULL, str(error))]
        except RequestError as error:  # the grammar cannot be started once more
            return [RequestFailed(request.handle, FailureKind.INVALID, str(error))]
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
