"""More sequences than the device has pages for: those behind give way to those before, and everybody ends with the right ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backend.engine.events import FailureKind, FinishReason, RequestFailed
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from tests.engine.device import VOCAB_SIZE
from tests.engine.trace import Abort, Add, Order, Pass, Trace

LIMITS = SchedulerLimits(4, 4, 80, 64, num_host_pages=12, has_prefix_cache=False, steady_from=1)


def ask(handle: int, num_prompt: int = 60, max_tokens: int = 100, **fields: Any) -> GenerationRequest:
    prompt = tuple((handle + number * 3) % VOCAB_SIZE for number in range(num_prompt))
    request = GenerationRequest(handle, "", prompt, max_tokens, ignore_eos=True, sampling=SamplingParams(seed=handle))
    return replace(request, **fields)


def swapped(trace: Trace) -> list[int]:
    """Handles of those that have pages on the host."""
    return [s.request.handle for s in trace.scheduler._running if s.kv.table.num_swapped]


def turn_until_swapped(trace: Trace, handle: int) -> None:
    for _ in range(200):
        if handle in swapped(trace):
            return
        trace.turn([])
    raise AssertionError(f"request {handle} never gave way")


@pytest.mark.parametrize("has_prefix_cache", [False, True])
@pytest.mark.parametrize("num_host_pages", [1, 4, 12])
def test_constant_preemption_ends_within_bounds_and_changes_no_id(num_host_pages: int, has_prefix_cache: bool) -> None:
    """Trace compares every id with the sequence alone, bounds the steps, and looks at all pages after each."""
    limits = replace(LIMITS, num_host_pages=num_host_pages, has_prefix_cache=has_prefix_cache)
    trace = Trace(limits, 1)
    orders: list[Order] = [Add(ask(handle, 30 + handle * 17 % 90)) for handle in range(1, 13)]
    trace.play([orders[start : start + 3] for start in range(0, 12, 3)])
    stats = trace.scheduler.stats()
    assert all(trace.finish_of(handle).num_output_tokens == 100 for handle in range(1, 13))
    assert stats.num_preempted_sequences >= (3 if num_host_pages >= 4 else 0)
    assert stats.num_swapped_pages >= stats.num_preempted_sequences


def test_without_host_pages_nobody_is_preempted_and_each_waits_for_all_its_pages() -> None:
    trace = Trace(replace(LIMITS, num_host_pages=0), 1)
    trace.turn([Add(ask(1)), Add(ask(2)), Add(ask(3, 10, 10))])
    assert trace.scheduler.stats().num_requests_waiting == 2, (
        "3 + 3 pages are promised of 4; the small one waits its turn"
    )
    trace.play([])
    assert trace.scheduler.stats().num_preempted_sequences == 0


def test_the_first_of_them_never_rests() -> None:
    trace = Trace(LIMITS, 1)
    trace.turn([Add(ask(handle)) for handle in range(1, 5)])
    for _ in range(100):
        trace.turn([])
        assert 1 not in swapped(trace)
    assert trace.finish_of(1).num_output_tokens == 100
    trace.play([])


def test_a_more_urgent_request_pushes_others_out() -> None:
    trace = Trace(replace(LIMITS, max_step_tokens=300), 1)
    trace.turn([Add(ask(1, 120, 60)), Add(ask(2, 120, 60))])
    trace.turn([])
    assert trace.scheduler.stats().num_pages_held == 4
    trace.turn([Add(ask(3, 120, 3, priority=-1))])
    assert swapped(trace) == [2]
    trace.turn([])
    assert trace.ids_of(3), "it did not wait for the others to end"
    assert not trace.is_ended(1)
    trace.play([])


def test_nobody_is_admitted_past_a_sequence_that_gave_way() -> None:
    """Two pages are free, but the one on the host needs three: a small one must not take them for good."""
    trace = Trace(replace(LIMITS, max_step_tokens=300), 1)
    trace.turn([Add(ask(1, 180, 10))])
    trace.turn([Add(ask(2, 100, 25, priority=-1)), Add(ask(3, 100, 2, priority=-1))])
    while not trace.is_ended(3) or trace.scheduler.stats().num_pages_held > 2:
        trace.turn([])
    assert swapped(trace) == [1]
    trace.turn([Add(ask(4, 1, 2))])
    assert trace.scheduler.stats().num_requests_waiting == 1
    trace.play([])


@pytest.mark.parametrize("order", ["abort", "deadline"])
def test_a_request_can_be_ended_while_it_is_on_the_host(order: str) -> None:
    trace = Trace(LIMITS, 1)
    trace.turn([Add(ask(1, 60, 60)), Add(ask(2, 60, 60)), Add(ask(3, 60, 60, deadline_ms=5000))])
    turn_until_swapped(trace, 3)
    trace.turn([Abort(3) if order == "abort" else Pass(5000)])
    assert trace.finish_of(3).reason is (FinishReason.CANCELLED if order == "abort" else FinishReason.DEADLINE)
    trace.play([])
    assert trace.finish_of(2).reason is FinishReason.LENGTH


def test_a_request_on_the_host_without_a_token_fails_at_its_deadline() -> None:
    trace = Trace(replace(LIMITS, max_step_tokens=70), 1)
    trace.turn([Add(ask(1, 180, 3, deadline_ms=5000))])
    trace.turn([Add(ask(2, 180, 60, priority=-1))])
    turn_until_swapped(trace, 1)
    trace.turn([Pass(5000)])
    (failed,) = trace.events[1]
    assert isinstance(failed, RequestFailed)
    assert failed.kind is FailureKind.DEADLINE
    trace.play([])


def test_samples_that_share_a_prompt_give_way_and_come_back() -> None:
    trace = Trace(replace(LIMITS, num_pages=8, num_host_pages=16, max_num_seqs=6, max_step_tokens=200), 1)
    trace.turn([Add(ask(1, 130, 90, num_return_sequences=4))])
    for _ in range(10):
        trace.turn([])
    trace.play([[Add(ask(2, 200, 100, priority=-1)), Add(ask(3, 200, 100, priority=-1))]])
    assert trace.scheduler.stats().num_preempted_sequences >= 4


def test_a_step_of_priority_is_worth_ten_seconds_of_waiting() -> None:
    limits = replace(LIMITS, max_num_seqs=1)
    for wait_ms, expected in ((9_000, [1, 3, 2]), (11_000, [1, 2, 3])):
        trace = Trace(limits, 1)
        trace.turn([Add(ask(1, 10, 5)), Add(ask(2, 10, 5))])
        trace.play([[Pass(wait_ms), Add(ask(3, 10, 5, priority=-1))]])
        first_run = sorted((trace.finish_of(handle).first_scheduled_time_ns, handle) for handle in (1, 2, 3))
        assert [handle for _, handle in first_run] == expected


def test_a_stream_of_urgent_requests_starves_nobody() -> None:
    """They arrive twice as fast as they can be served, so one always waits; after 20 s they rank behind the patient one."""
    trace = Trace(replace(LIMITS, max_num_seqs=1), 1)
    trace.turn([Add(ask(1, 5, 10, priority=-1)), Add(ask(2, 5, 10, priority=1))])
    for handle in range(3, 60):
        trace.turn([Pass(1000), Add(ask(handle, 5, 10, priority=-1))])
        for _ in range(5):
            trace.turn([])
        if trace.is_ended(2):
            break
    assert trace.finish_of(2).reason is FinishReason.LENGTH
    assert trace.scheduler.stats().num_requests_waiting > 1
    trace.play([])
