"""The loop while grammars are compiled: nothing waits for them, and their requests can be taken back like any other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from backend.engine.engine import Engine
from backend.engine.events import FailureKind, FinishReason, RequestFailed
from backend.engine.plan import StepPlan
from backend.engine.request import GuideSpec
from backend.engine.scheduler import Scheduler
from tests.engine.test_engine import (
    EOS,
    GUIDE,
    LIMITS,
    TIMEOUT_S,
    TOKEN_BYTES,
    OnlyId,
    RecordedRunner,
    RecordedStep,
    Recorder,
    ask,
    running,
)


class SlowCompiler:
    """Compiles nothing before it is let go; tells what it was given."""

    def __init__(self) -> None:
        self.has_started, self.may_end = threading.Event(), threading.Event()
        self.specs: list[GuideSpec] = []

    def __call__(self, spec: GuideSpec, num_sequences: int) -> OnlyId:
        self.specs.append(spec)
        self.has_started.set()
        assert self.may_end.wait(TIMEOUT_S)
        return OnlyId()


class MaskedRunner(RecordedRunner):
    """Draws FIRST_ID, which is what OnlyId allows; keeps no record."""

    def launch(self, plan: StepPlan) -> RecordedStep:
        self.calls.clear()
        return super().launch(plan)


@contextmanager
def compiling(recorder: Recorder, **limits: Any) -> Iterator[tuple[Engine, SlowCompiler]]:
    """An engine that has request 1, whose grammar is being compiled."""
    compiler = SlowCompiler()
    engine = Engine(Scheduler(replace(LIMITS, **limits), TOKEN_BYTES, EOS), MaskedRunner(), recorder.emit, compiler)
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield engine, compiler
    finally:
        compiler.may_end.set()
        engine.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_a_grammar_that_takes_long_holds_up_nothing() -> None:
    recorder = Recorder()
    with compiling(recorder) as (engine, compiler):
        engine.submit(ask(1, guide=GUIDE))
        assert compiler.has_started.wait(TIMEOUT_S)
        engine.submit(ask(2))
        recorder.wait_for(lambda: recorder.is_ended(2))
        assert recorder.of(1) == []
        compiler.may_end.set()
        recorder.wait_for(lambda: recorder.is_ended(1))
    assert recorder.reason(1) is recorder.reason(2) is FinishReason.LENGTH


@pytest.mark.parametrize("way", ["handle", "request id", "all"])
def test_a_request_is_taken_back_while_its_grammar_is_compiled(way: str) -> None:
    recorder = Recorder()
    with compiling(recorder) as (engine, compiler):
        engine.submit(ask(1, guide=GUIDE, request_id="mine"))
        match way:
            case "handle":
                engine.abort(1)
            case "request id":
                engine.abort_request_id("mine")
            case _:
                engine.abort_all()
        recorder.wait_for(lambda: recorder.is_ended(1))
        compiler.may_end.set()
        engine.submit(ask(2))
        recorder.wait_for(lambda: recorder.is_ended(2) and recorder.is_idle())
    assert recorder.of(1) == [RequestFailed(1, FailureKind.CANCELLED, "cancelled")]


def test_a_request_that_was_taken_back_is_not_compiled() -> None:
    recorder = Recorder()
    with compiling(recorder) as (engine, compiler):
        for handle in range(1, 8):
            engine.submit(ask(handle, guide=GuideSpec("regex", str(handle))))
        engine.abort_all()
        recorder.wait_for(lambda: all(map(recorder.is_ended, range(1, 8))))
        num_compiled = len(compiler.specs)
        compiler.may_end.set()
        engine.submit(ask(8, guide=GUIDE))
        recorder.wait_for(lambda: recorder.is_ended(8))
    assert num_compiled <= 4
    assert len(compiler.specs) == num_compiled + 1


def test_a_request_whose_grammar_is_compiled_counts_as_waiting() -> None:
    recorder = Recorder()
    with compiling(recorder, max_queued_requests=1) as (engine, compiler):
        engine.submit(ask(1, guide=GUIDE))
        engine.submit(ask(2))
        recorder.wait_for(lambda: recorder.is_ended(2))
        assert recorder.stats[-1].num_requests_waiting == 1
        compiler.may_end.set()
        recorder.wait_for(lambda: recorder.is_ended(1))
    (failed,) = recorder.of(2)
    assert isinstance(failed, RequestFailed)
    assert failed.kind is FailureKind.QUEUE_FULL


def test_a_deadline_passes_while_the_grammar_of_the_only_request_is_compiled() -> None:
    recorder = Recorder()
    with compiling(recorder) as (engine, _):
        engine.submit(ask(1, guide=GUIDE, deadline_ms=50))
        recorder.wait_for(lambda: recorder.is_ended(1))
    (failed,) = recorder.of(1)
    assert isinstance(failed, RequestFailed)
    assert failed.kind is FailureKind.DEADLINE


def test_a_compiler_that_breaks_fails_its_request_alone() -> None:
    def broken(spec: GuideSpec, num_sequences: int) -> OnlyId:
        raise ZeroDivisionError("a bug")

    recorder = Recorder()
    with running(recorder, compile_guide=broken) as (engine, _):
        engine.submit(ask(1, guide=GUIDE))
        engine.submit(ask(2))
        recorder.wait_for(lambda: recorder.is_ended(1) and recorder.is_ended(2))
    problem = "the grammar could not be compiled: ZeroDivisionError: a bug"
    assert recorder.of(1) == [RequestFailed(1, FailureKind.ENGINE, problem)]
    assert recorder.reason(2) is FinishReason.LENGTH
