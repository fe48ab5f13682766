"""A sequence that ends has a row in the step in flight: what that draws is dropped; slot and page are held until then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from backend.engine.engine import Engine
from backend.engine.events import EngineStats, Event, FinishReason, TokenEvent, one_by_one
from backend.engine.plan import StepPlan, StepResult
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.runner.fake_runner import FakeRunner
from backend.runner.model_runner import InFlightStep, Mask
from tests.engine.test_engine import EOS, FIRST_ID, TOKEN_BYTES, ask

STEP_S = 0.002
NUM_IDS = 5
"""So many the first request gets, when it ends by what it drew."""
DEADLINE_MS = 60_000
ONE_PLACE = SchedulerLimits(num_pages=1, max_num_seqs=1, max_step_tokens=64, max_queued_requests=4, steady_from=1)
DEVICE = FakeRunner(num_pages=1, max_num_seqs=1, first_id=FIRST_ID)
IDS = {handle: [DEVICE.token_at(handle, position) for position in range(40)] for handle in (1, 2)}


class LateScheduler(Scheduler):
    """Its deadlines can be made to pass."""

    num_late_ns = 0

    def expire(self, now_ns: int) -> list[Event]:
        return super().expire(now_ns + self.num_late_ns)


class WatchedRunner:
    """A device that takes its time, and a list of the calls that came: `launched` with the handle that has the row, `over`."""

    num_pages, num_host_pages, max_num_seqs, caches_outputs = 1, 0, 1, True

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.handle = 0
        self._device = FakeRunner(num_pages=1, max_num_seqs=1, step_time_s=STEP_S, first_id=FIRST_ID)

    def launch(self, plan: StepPlan) -> WatchedStep:
        (row,) = plan.rows
        assert (row.slot, row.page_ids) == (0, (0,))
        self.handle = self.handle if row.slot_start is None else row.slot_start.sampling.seed
        self.calls.append(("launched", plan.step, self.handle))
        return WatchedStep(self.calls, plan.step, self.handle, self._device.launch(plan))

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class WatchedStep:
    calls: list[tuple[str, int, int]]
    number: int
    handle: int
    step: InFlightStep

    def draw(self, masks: Mapping[int, Mask]) -> None:
        self.step.draw(masks)

    def result(self) -> StepResult:
        self.calls.append(("over", self.number, self.handle))
        return self.step.result()


@dataclass
class Run:
    """Two requests where there is room for one; `meanwhile` is done when the first ended, or gets its id number `num_ids`."""

    meanwhile: Callable[[Run], None]
    num_ids: int = NUM_IDS
    runner: WatchedRunner = field(default_factory=WatchedRunner)
    events: dict[int, list[TokenEvent]] = field(default_factory=lambda: {1: [], 2: []})

    def serve(self, **ending: Any) -> Run:
        self.scheduler = LateScheduler(ONE_PLACE, TOKEN_BYTES, EOS)
        self.engine = Engine(self.scheduler, self.runner, self._emit)
        self.engine.submit(replace(ask(1, 40, deadline_ms=DEADLINE_MS, request_id="first"), **ending))
        self.engine.submit(ask(2, 3))
        self.engine.run()
        assert not self.scheduler.has_work
        self.scheduler.check_integrity()
        return self

    def _emit(self, events: list[Event], stats: EngineStats) -> None:
        for event in one_by_one(events):
            assert isinstance(event, TokenEvent), "both have tokens"
            self.events[event.handle].append(event)
            if event.handle == 1 and len(self.events[1]) == self.num_ids:
                _, number, _ = self.runner.calls[-1]
                assert self.runner.calls[-2:] == [("launched", number + 1, 1), ("over", number, 1)], (
                    "a step is in flight"
                )
                self.meanwhile(self)
        if self.events[2] and self.events[2][-1].is_request_end and not stats.num_pages_held:
            self.engine.stop()

    def ids_of(self, handle: int) -> list[int]:
        return [token_id for event in self.events[handle] for token_id in event.token_ids]

    def check(self) -> None:
        """Each ended once, with its last event, and the second began only when nothing of the first was in flight."""
        for events in self.events.values():
            assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
        handles = [handle for _, _, handle in self.runner.calls]
        assert handles == sorted(handles), "the second has the only page while a step with a row of the first runs"
        launched, over = ([call[1:] for call in self.runner.calls if call[0] == kind] for kind in ("launched", "over"))
        assert launched == over
        assert sum(handle == 1 for _, handle in launched) == len(self.ids_of(1)) + 1, "one id more was drawn than given"
        assert self.ids_of(1) == IDS[1][: len(self.ids_of(1))]
        assert self.ids_of(2) == IDS[2][:3], "the place is as good as new"


def do_nothing(run: Run) -> None:
    """The usual case."""


def abort(run: Run) -> None:
    run.engine.abort(1)


def abort_request_id(run: Run) -> None:
    run.engine.abort_request_id("first")


def pass_deadline(run: Run) -> None:
    run.scheduler.num_late_ns = 2 * DEADLINE_MS * 1_000_000


@pytest.mark.parametrize("meanwhile", [do_nothing, abort, abort_request_id, pass_deadline])
@pytest.mark.parametrize(
    "ending",
    [
        {"stop_token_ids": (IDS[1][NUM_IDS - 1],)},
        {"end_id": IDS[1][NUM_IDS - 1]},
        {"stop_strings": (TOKEN_BYTES[IDS[1][NUM_IDS - 1]],)},
        {"stop_strings": (b"".join(TOKEN_BYTES[token_id] for token_id in IDS[1][1:NUM_IDS]),)},
    ],
    ids=["stop id", "end id", "stop string of one id", "stop string of several ids"],
)
def test_one_that_ends_by_what_it_drew(ending: dict[str, Any], meanwhile: Callable[[Run], None]) -> None:
    """What comes for it after its end, such as an abort, finds it ended."""
    run = Run(meanwhile).serve(**ending)
    run.check()
    assert len(run.ids_of(1)) == NUM_IDS
    finish = run.events[1][-1].finish
    assert finish is not None
    assert (finish.reason, finish.num_output_tokens) == (FinishReason.STOP, NUM_IDS)


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        (abort, FinishReason.CANCELLED),
        (abort_request_id, FinishReason.CANCELLED),
        (pass_deadline, FinishReason.DEADLINE),
    ],
)
def test_one_that_is_ended_from_outside(meanwhile: Callable[[Run], None], reason: FinishReason) -> None:
    run = Run(meanwhile, num_ids=3).serve()
    run.check()
    finish = run.events[1][-1].finish
    assert finish is not None
    assert (finish.reason, finish.num_output_tokens) == (reason, 3)
    assert run.events[1][-1].token_ids == (), "its end says nothing more"
