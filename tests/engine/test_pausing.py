"""Streams that are far ahead of their clients pause in the engine's loop, which does not turn for them."""

from __future__ import annotations

import threading
from dataclasses import replace

from backend.engine.events import FinishReason, TokenEvent
from tests.engine.test_engine import LIMITS, Recorder, ask, running, wait_until


def test_a_stream_that_is_far_ahead_of_its_client_pauses_without_turning_and_goes_on() -> None:
    recorder, num_tokens = Recorder(), 12
    with running(recorder, limits=replace(LIMITS, max_unsent_tokens=4)) as (engine, runner):
        engine.submit(ask(1, num_tokens, stream=True))
        engine.submit(ask(2, num_tokens))
        recorder.wait_for(lambda: recorder.is_ended(2) and len(recorder.of(1)) >= 4)
        wait_until(lambda: engine.turn_age_s == 0.0)
        num_turns, num_ahead = len(recorder.stats), len(recorder.of(1))
        threading.Event().wait(0.05)
        assert len(recorder.stats) == num_turns, "it turns although nothing can run"
        assert num_ahead in (4, 5), "the bound, and the step that was in flight"
        engine.submit(ask(3, 2))
        recorder.wait_for(lambda: recorder.is_ended(3))
        assert len(recorder.of(1)) == num_ahead, "others go on meanwhile"
        while not recorder.is_ended(1):
            num_before = len(recorder.of(1))
            engine.note_sent({1: num_before, 99: 5})
            recorder.wait_for_more(1, num_before)
    ids = [i for event in recorder.of(1) if isinstance(event, TokenEvent) for i in event.token_ids]
    assert ids == [runner.token_at(1, position) for position in range(num_tokens)]


def test_a_paused_stream_ends_at_its_deadline_and_can_be_taken_back() -> None:
    recorder = Recorder()
    with running(recorder, limits=replace(LIMITS, max_unsent_tokens=2)) as (engine, _):
        engine.submit(ask(1, 50, stream=True, deadline_ms=200))
        engine.submit(ask(2, 50, stream=True))
        recorder.wait_for(lambda: recorder.is_ended(1))
        assert recorder.reason(1) is FinishReason.DEADLINE
        assert not recorder.is_ended(2)
        engine.abort(2)
        recorder.wait_for(lambda: recorder.is_ended(2) and recorder.is_idle())
        assert recorder.reason(2) is FinishReason.CANCELLED
