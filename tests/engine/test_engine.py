"""The loop: one step ahead, fed by its inbox, ended by its runner's first exception."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backend.engine.engine import CompileGuide, Engine
from backend.engine.events import (
    STEP_TIME_BOUNDS_S,
    EngineStats,
    Event,
    FailureKind,
    FinishReason,
    RequestFailed,
    SingleEvent,
    TokenEvent,
    one_by_one,
)
from backend.engine.plan import StepPlan, StepResult
from backend.engine.request import GenerationRequest, GuideSpec, SamplingParams
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.engine.sequence import Guide
from backend.errors import RequestError
from backend.runner.fake_runner import FakeRunner
from backend.runner.model_runner import Mask

TOKEN_BYTES = (b"",) * 3 + tuple(bytes([byte]) for byte in range(256))
FIRST_ID = 3
EOS = 2
LIMITS = SchedulerLimits(num_pages=64, max_num_seqs=4, max_step_tokens=64, max_queued_requests=8, steady_from=1)
TIMEOUT_S = 20.0
GUIDE = GuideSpec("regex", "a")


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def ask(handle: int, max_tokens: int = 5, **changes: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=1.0, seed=handle)
    request = GenerationRequest(
        handle=handle, request_id="", prompt_token_ids=(FIRST_ID,), max_tokens=max_tokens, sampling=sampling
    )
    return replace(request, **changes)


class Recorder:
    """What the loop emitted, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[SingleEvent] = []
        self.stats: list[EngineStats] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def emit(self, events: list[Event], stats: EngineStats) -> None:
        with self._changed:
            self.events += one_by_one(events)
            self.stats.append(stats)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, TIMEOUT_S), "the engine did not get there"

    def wait_for_more(self, handle: int, num_before: int) -> None:
        self.wait_for(lambda: len(self.of(handle)) > num_before)

    def of(self, handle: int) -> list[SingleEvent]:
        return [event for event in self.events if event.handle == handle]

    def is_ended(self, handle: int) -> bool:
        return any(isinstance(event, RequestFailed) or event.is_request_end for event in self.of(handle))

    def reason(self, handle: int) -> FinishReason | None:
        last = self.of(handle)[-1]
        assert isinstance(last, TokenEvent)
        return last.finish.reason if last.finish is not None else None

    def is_idle(self) -> bool:
        return bool(self.stats) and self.stats[-1].num_pages_held == 0 == self.stats[-1].num_requests_waiting


@contextmanager
def running(
    recorder: Recorder,
    step_time_s: float = 0.0,
    limits: SchedulerLimits = LIMITS,
    compile_guide: CompileGuide | None = None,
) -> Iterator[tuple[Engine, FakeRunner]]:
    runner = FakeRunner(
        num_pages=limits.num_pages, max_num_seqs=limits.max_num_seqs, step_time_s=step_time_s, first_id=FIRST_ID
    )
    engine = Engine(Scheduler(limits, TOKEN_BYTES, EOS), runner, recorder.emit, compile_guide)
    thread = threading.Thread(target=engine.run, name="loop")
    thread.start()
    try:
        yield engine, runner
    finally:
        engine.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_requests_from_other_threads_are_answered_in_the_loops_thread() -> None:
    recorder = Recorder()
    with running(recorder) as (engine, runner):
        for handle in (1, 2, 3):
            engine.submit(ask(handle))
        recorder.wait_for(lambda: all(recorder.is_ended(handle) for handle in (1, 2, 3)) and recorder.is_idle())
        engine.submit(ask(4))
        recorder.wait_for(lambda: recorder.is_ended(4) and recorder.is_idle())
    for handle in (1, 2, 3, 4):
        ids = [i for event in recorder.of(handle) if isinstance(event, TokenEvent) for i in event.token_ids]
        assert ids == [runner.token_at(handle, position) for position in range(5)]
    assert recorder.threads == {"loop"}


def test_an_idle_engine_waits_without_turning() -> None:
    recorder = Recorder()
    with running(recorder) as (engine, _):
        engine.submit(ask(1, max_tokens=1))
        recorder.wait_for(lambda: recorder.is_ended(1))
        num_turns = len(recorder.stats)
        threading.Event().wait(0.05)
        assert len(recorder.stats) == num_turns


class RecordedRunner:
    """Writes down in which order the loop launches steps and asks for their results."""

    num_pages, num_host_pages, max_num_seqs = LIMITS.num_pages, 0, LIMITS.max_num_seqs
    caches_outputs = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def launch(self, plan: StepPlan) -> RecordedStep:
        self.calls.append(("launch", plan.step))
        return RecordedStep(self, plan.step, sum(row.is_sampled for row in plan.rows))

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


class RecordedStep:
    def __init__(self, runner: RecordedRunner, number: int, num_ids: int) -> None:
        self._runner, self._number, self._num_ids = runner, number, num_ids

    def draw(self, masks: Mapping[int, Mask]) -> None:
        self._runner.calls.append(("draw", self._number))

    def result(self) -> StepResult:
        self._runner.calls.append(("result", self._number))
        return StepResult((FIRST_ID,) * self._num_ids)


def run_to_the_end(
    runner: Any, request: GenerationRequest, compile_guide: CompileGuide | None = None
) -> list[SingleEvent]:
    """Run in this thread; the last event stops the loop."""
    emitted: list[SingleEvent] = []

    def emit(events: list[Event], stats: EngineStats) -> None:
        emitted.extend(one_by_one(events))
        if not stats.num_pages_held and emitted:
            engine.stop()

    engine = Engine(Scheduler(LIMITS, TOKEN_BYTES, EOS), runner, emit, compile_guide)
    engine.submit(request)
    engine.run()
    return emitted


def test_a_step_is_launched_before_the_result_of_the_one_before_is_asked_for() -> None:
    runner = RecordedRunner()
    run_to_the_end(runner, ask(1, max_tokens=3))
    assert runner.calls == [
        *(("launch", 0), ("draw", 0), ("launch", 1), ("draw", 1), ("result", 0)),
        *(("launch", 2), ("draw", 2), ("result", 1), ("result", 2)),
    ]


class OnlyId:
    """A grammar that allows FIRST_ID alone."""

    def start(self) -> OnlyId:
        return self

    def accept(self, token_id: int) -> None:
        assert token_id == FIRST_ID

    def mask(self) -> Mask:
        return np.array([1 << FIRST_ID] + [0] * 8, dtype=np.int32)

    def forced_ids(self) -> tuple[int, ...]:
        return ()


def test_with_a_grammar_a_step_is_launched_before_and_drawn_behind_the_result_of_the_one_before() -> None:
    runner = RecordedRunner()
    compiled: list[tuple[GuideSpec, int]] = []

    def compile_guide(spec: GuideSpec, num_sequences: int) -> OnlyId:
        compiled.append((spec, num_sequences))
        return OnlyId()

    run_to_the_end(runner, ask(1, max_tokens=3, guide=GUIDE), compile_guide)
    assert runner.calls == [
        *(("launch", 0), ("draw", 0), ("launch", 1), ("result", 0), ("draw", 1)),
        *(("launch", 2), ("result", 1), ("draw", 2), ("result", 2)),
    ]
    assert compiled == [(GUIDE, 1)]


def refuse(spec: GuideSpec, num_sequences: int) -> OnlyId:
    raise RequestError("guided_decoding_guide", f"{spec.text} is no grammar")


@pytest.mark.parametrize(
    ("compile_guide", "message"),
    [
        (refuse, "guided_decoding_guide: a is no grammar"),
        (None, "guided_decoding_guide_type: this runner cannot follow a grammar; leave it out"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_and_the_engine_goes_on(
    compile_guide: CompileGuide | None, message: str
) -> None:
    recorder = Recorder()
    with running(recorder, compile_guide=compile_guide) as (engine, _):
        engine.submit(ask(1, guide=GUIDE))
        engine.submit(ask(2))
        recorder.wait_for(lambda: recorder.is_ended(1) and recorder.is_ended(2))
    assert recorder.of(1) == [RequestFailed(1, FailureKind.INVALID, message)]
    assert recorder.reason(2) is FinishReason.LENGTH


def test_the_age_of_a_turn_grows_while_a_step_hangs_and_is_0_when_idle() -> None:
    hanging, release = threading.Event(), threading.Event()

    class HangingStep(RecordedStep):
        def result(self) -> StepResult:
            hanging.set()
            assert release.wait(TIMEOUT_S)
            return super().result()

    class HangingRunner(RecordedRunner):
        def launch(self, plan: StepPlan) -> RecordedStep:
            return HangingStep(self, plan.step, len(plan.rows))

    recorder = Recorder()
    engine = Engine(Scheduler(LIMITS, TOKEN_BYTES, EOS), HangingRunner(), recorder.emit)
    thread = threading.Thread(target=engine.run)
    thread.start()
    assert engine.turn_age_s == 0
    engine.submit(ask(1, max_tokens=1))
    assert hanging.wait(TIMEOUT_S)
    before_s = engine.turn_age_s
    threading.Event().wait(0.05)
    assert engine.turn_age_s >= before_s + 0.04
    release.set()
    recorder.wait_for(lambda: recorder.is_ended(1) and recorder.is_idle())
    wait_until(lambda: engine.turn_age_s == 0)
    step_times_s = [stats.step_time_s for stats in recorder.stats]
    assert step_times_s == sorted(step_times_s)
    assert step_times_s[-1] >= 0.05
    counts = recorder.stats[-1].step_time_counts
    assert sum(counts) == 2, "one turn launched the step, another committed it"
    assert sum(counts[bisect_left(STEP_TIME_BOUNDS_S, 0.05) :]) == 1, "which took longer"
    engine.stop()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_the_age_of_a_turn_grows_while_an_order_hangs() -> None:
    hanging, release = threading.Event(), threading.Event()

    class HangingScheduler(Scheduler):
        def abort_request_id(self, request_id: str) -> list[Event]:
            hanging.set()
            assert release.wait(TIMEOUT_S)
            return super().abort_request_id(request_id)

    engine = Engine(HangingScheduler(LIMITS, TOKEN_BYTES, EOS), RecordedRunner(), Recorder().emit)
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.abort_request_id("x")
    assert hanging.wait(TIMEOUT_S)
    wait_until(lambda: engine.turn_age_s > 0.04)
    release.set()
    wait_until(lambda: engine.turn_age_s == 0)
    engine.stop()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_no_thread_is_started_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be started, without memory for it, would hang the loop."""

    def refuse(*_: Any) -> Guide:
        raise RequestError("guided_decoding_guide", "is not usable")

    recorder = Recorder()
    engine = Engine(Scheduler(LIMITS, TOKEN_BYTES, EOS), RecordedRunner(), recorder.emit, refuse)
    thread = threading.Thread(target=engine.run)
    thread.start()
    engine.submit(ask(1))
    recorder.wait_for(lambda: recorder.is_ended(1))
    with monkeypatch.context() as without_memory:
        without_memory.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread is started"))
        engine.submit(ask(2, guide=GUIDE))
        recorder.wait_for(lambda: recorder.is_ended(2))
    engine.stop()
    thread.join(TIMEOUT_S)
    assert isinstance(recorder.of(2)[0], RequestFailed)


@pytest.mark.parametrize("failing", ["launch", "result"])
def test_an_exception_of_the_runner_ends_the_loop(failing: str) -> None:
    class Broken(RecordedRunner):
        def launch(self, plan: StepPlan) -> RecordedStep:
            step = super().launch(plan)
            if failing == "launch" and plan.step == 1:
                raise RuntimeError("the device is gone")
            return step

    class BrokenStep(RecordedStep):
        def result(self) -> StepResult:
            raise RuntimeError("the device is gone")

    runner = Broken()
    if failing == "result":
        runner.launch = lambda plan: BrokenStep(runner, plan.step, 1)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_to_the_end(runner, ask(1))


def test_an_abort_by_handle_leaves_the_others() -> None:
    recorder = Recorder()
    with running(recorder, step_time_s=0.001) as (engine, _):
        engine.submit(ask(1, max_tokens=2000))
        engine.submit(ask(2, max_tokens=200))
        recorder.wait_for(lambda: bool(recorder.of(1)))
        engine.abort(1)
        recorder.wait_for(lambda: recorder.is_ended(1))
        assert not recorder.is_ended(2)
        recorder.wait_for(lambda: recorder.is_ended(2) and recorder.is_idle())
    assert (recorder.reason(1), recorder.reason(2)) == (FinishReason.CANCELLED, FinishReason.LENGTH)
    assert len(recorder.of(1)) < 2000


def test_an_abort_by_request_id_takes_all_of_that_name() -> None:
    recorder = Recorder()
    with running(recorder, step_time_s=0.001) as (engine, _):
        for handle, name in ((1, "mine"), (2, "yours"), (3, "mine")):
            engine.submit(ask(handle, max_tokens=300, request_id=name))
        recorder.wait_for(lambda: bool(recorder.of(3)))
        engine.abort_request_id("mine")
        recorder.wait_for(lambda: all(map(recorder.is_ended, (1, 2, 3))))
    assert [recorder.reason(handle) for handle in (1, 2, 3)] == [
        *(FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.CANCELLED),
    ]


def test_abort_all_empties_the_engine_and_it_goes_on_serving() -> None:
    recorder = Recorder()
    with running(recorder, step_time_s=0.001) as (engine, _):
        for handle in range(1, 7):
            engine.submit(ask(handle, max_tokens=500))
        recorder.wait_for(lambda: bool(recorder.of(4)))
        engine.abort_all()
        recorder.wait_for(lambda: all(map(recorder.is_ended, range(1, 7))) and recorder.is_idle())
        engine.submit(ask(7, max_tokens=1))
        recorder.wait_for(lambda: recorder.is_ended(7))
    assert [recorder.reason(handle) for handle in range(1, 5)] == [FinishReason.CANCELLED] * 4
    for handle in (5, 6):
        (failed,) = recorder.of(handle)
        assert isinstance(failed, RequestFailed)
        assert failed.kind is FailureKind.CANCELLED
    assert recorder.reason(7) is FinishReason.LENGTH


def test_a_full_queue_is_answered_through_emit() -> None:
    recorder = Recorder()
    limits = SchedulerLimits(num_pages=64, max_num_seqs=1, max_step_tokens=64, max_queued_requests=1)
    with running(recorder, step_time_s=0.001, limits=limits) as (engine, _):
        engine.submit(ask(1, max_tokens=1000))
        recorder.wait_for(lambda: bool(recorder.of(1)))
        engine.submit(ask(2))
        engine.submit(ask(3))
        recorder.wait_for(lambda: recorder.is_ended(3))
        engine.abort_all()
        recorder.wait_for(lambda: recorder.is_ended(1) and recorder.is_ended(2))
    (failed,) = recorder.of(3)
    assert isinstance(failed, RequestFailed)
    assert (failed.kind, failed.message[:36]) == (FailureKind.QUEUE_FULL, "the queue is full: 1 requests wait, ")


def test_a_deadline_ends_a_request_that_runs() -> None:
    recorder = Recorder()
    with running(recorder, step_time_s=0.002) as (engine, _):
        engine.submit(ask(1, max_tokens=2000, deadline_ms=100))
        recorder.wait_for(lambda: recorder.is_ended(1))
    assert recorder.reason(1) is FinishReason.DEADLINE


def test_stop_ends_a_loop_that_has_work() -> None:
    recorder = Recorder()
    with running(recorder, step_time_s=0.001) as (engine, _):
        engine.submit(ask(1, max_tokens=2000))
        recorder.wait_for(lambda: bool(recorder.of(1)))
    assert not recorder.is_ended(1)
