"""The loop: one step ahead of the device, from the first day."""

from __future__ import annotations

import logging
import queue
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from backend.engine.events import STEP_TIME_BOUNDS_S, EngineStats, Event, FailureKind, RequestFailed
from backend.engine.plan import StepPlan
from backend.engine.request import GenerationRequest, GuideSpec
from backend.engine.scheduler import Scheduler
from backend.engine.sequence import Guide
from backend.errors import QueueFull, RequestError
from backend.runner.model_runner import InFlightStep, ModelRunner

log = logging.getLogger("nemo.engine")
_NUM_GUIDE_THREADS = 4
"""So that guides known to compile pass by a few that take long."""

Emit = Callable[[list[Event], EngineStats], None]
CompileGuide = Callable[[GuideSpec, int], Guide]


class Launched(NamedTuple):
    """A step on the device."""

    plan: StepPlan
    step: InFlightStep


class Engine:
    """Runs a Scheduler over a ModelRunner; other threads talk to it through its inbox alone.

    `emit` is called in the loop's thread with the events of a turn and how busy the engine is afterwards. `compile_guide` raises
    RequestError for a grammar that cannot be used, and gets the number of sequences that will follow it; it is called in threads
    of its own, several at a time. Without it every grammar is refused.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, emit: Emit, compile_guide: CompileGuide | None = None
    ) -> None:
        self._scheduler = scheduler
        self._compile_guide = compile_guide
        self._turn_started_s = 0.0
        self._step_time_s = 0.0
        self._step_time_counts = [0] * (len(STEP_TIME_BOUNDS_S) + 1)
        self._runner = runner
        self._emit = emit
        self._inbox: queue.SimpleQueue[Callable[[], list[Event]] | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._guide_threads = ThreadPoolExecutor(_NUM_GUIDE_THREADS, thread_name_prefix="guide")

    def submit(self, request: GenerationRequest) -> None:
        """Queue a validated request; it is answered through `emit`, a full queue and a bad grammar too."""
        arrival_ns = time.monotonic_ns()
        self._inbox.put(lambda: self._add(request, arrival_ns))

    def abort(self, handle: int) -> None:
        """Take a request back, by the engine's own handle."""
        self._inbox.put(lambda: self._scheduler.abort(handle))

    def abort_request_id(self, request_id: str) -> None:
        """Take back every request that its client named `request_id`."""
        self._inbox.put(lambda: self._scheduler.abort_request_id(request_id))

    def note_sent(self, counts: Mapping[int, int]) -> None:
        """Take over how many ids of which requests, by handle, have been sent to their clients."""
        self._inbox.put(lambda: self._note_sent(counts))

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
        try:
            self._start_guide_threads()
            self._run()
        finally:
            self._guide_threads.shutdown(wait=False, cancel_futures=True)

    def _start_guide_threads(self) -> None:
        """All at once, before anything is served: one that was started later, without memory for it, would hang the loop."""
        started = threading.Barrier(_NUM_GUIDE_THREADS)
        try:
            for _ in range(_NUM_GUIDE_THREADS):
                self._guide_threads.submit(started.wait)
        except BaseException:  # those that wait for the others must not wait for ever
            started.abort()
            raise

    def _run(self) -> None:
        in_flight: Launched | None = None
        can_go_on = False
        while True:
            is_idle = in_flight is None and not can_go_on
            self._turn_started_s = 0.0
            events = self._drain_inbox(wait=is_idle)
            if self._is_stopping:
                return
            self._turn_started_s = time.monotonic()
            events += self._scheduler.expire(time.monotonic_ns())
            plan = self._scheduler.plan(time.monotonic_ns())
            launched = None if plan is None else Launched(plan, self._runner.launch(plan))
            needs_masks = plan is not None and plan.needs_masks
            if launched is not None and not needs_masks:
                launched.step.draw({})
            if in_flight is not None:
                events += self._scheduler.commit(in_flight.plan, in_flight.step.result(), time.monotonic_ns())
            if launched is not None and needs_masks:
                launched.step.draw(self._scheduler.masks(launched.plan))
            if launched is not None or in_flight is not None:
                self._count_step_time(time.monotonic() - self._turn_started_s)
            can_go_on = self._scheduler.has_work and (launched is not None or in_flight is not None)
            in_flight = launched
            if not self._scheduler.has_work:
                self._scheduler.check_integrity()
            self._emit(events, self._stats())

    def _count_step_time(self, seconds: float) -> None:
        self._step_time_s += seconds
        self._step_time_counts[bisect_left(STEP_TIME_BOUNDS_S, seconds)] += 1

    def _stats(self) -> EngineStats:
        counts = tuple(self._step_time_counts)
        stats: EngineStats = msgspec.structs.replace(
            self._scheduler.stats(), step_time_s=self._step_time_s, step_time_counts=counts
        )
        return stats

    def _note_sent(self, counts: Mapping[int, int]) -> list[Event]:
        self._scheduler.note_sent(counts)
        return []

    def _add(self, request: GenerationRequest, arrival_ns: int) -> list[Event]:
        """Take a request into the queue; only then is its grammar compiled, so that the bounds of the queue hold for that too."""
        if request.guide is not None and self._compile_guide is None:
            problem = "guided_decoding_guide_type: this runner cannot follow a grammar; leave it out"
            return [RequestFailed(request.handle, FailureKind.INVALID, problem)]
        try:
            self._scheduler.add(request, arrival_ns)
        except QueueFull as error:
            return [RequestFailed(request.handle, FailureKind.QUEUE_FULL, str(error))]
        if request.guide is not None:
            self._guide_threads.submit(self._compile, request, request.guide)
        return []

    def _compile(self, request: GenerationRequest, spec: GuideSpec) -> None:
        """Compile a grammar, in a thread where nobody waits for it, and tell the loop."""
        if not self._scheduler.is_listed(request.handle):
            return  # taken back meanwhile
        assert self._compile_guide is not None
        try:
            guide = self._compile_guide(spec, request.num_return_sequences)
        except RequestError as error:
            problem = str(error)
            self._inbox.put(lambda: self._scheduler.fail(request.handle, FailureKind.INVALID, problem))
        except Exception as error:  # a bug of ours must fail this request alone
            log.exception("the grammar of request %r could not be compiled", request.request_id)
            problem = f"the grammar could not be compiled: {type(error).__name__}: {error}"
            self._inbox.put(lambda: self._scheduler.fail(request.handle, FailureKind.ENGINE, problem))
        else:
            self._inbox.put(lambda: self._scheduler.give_guide(request.handle, guide))

    def _drain_inbox(self, *, wait: bool) -> list[Event]:
        """Carry out what has come; `wait` for the first order, or until a deadline (of a
        paused stream, or of a request whose grammar is being compiled)."""
        events: list[Event] = []
        while True:
            try:
                order = self._inbox.get(block=wait, timeout=self._scheduler.next_deadline_s(time.monotonic_ns()))
            except queue.Empty:
                return events
            wait = False
            if order is None:
                self._is_stopping = True
                return events
            self._turn_started_s = self._turn_started_s or time.monotonic()  # an order that hangs is a turn that hangs
            events += order()
