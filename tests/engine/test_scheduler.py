"""The Scheduler in cases small enough to work out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from backend.engine.events import Event, FailureKind, FinishReason, RequestFailed, SingleEvent, TokenEvent, one_by_one
from backend.engine.plan import StepPlan, StepResult, TokenLogProbs
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.errors import QueueFull

TOKEN_BYTES = (b"", b"", b"a", b"b", b"\xc3", b"\xa9")
CONTROL, EOS, A, B, LEAD, TAIL = range(6)
LIMITS = SchedulerLimits(num_pages=16, max_num_seqs=4, max_step_tokens=32, max_queued_requests=8)


def make_scheduler(**limits: Any) -> Scheduler:
    return Scheduler(dataclasses.replace(LIMITS, **limits), TOKEN_BYTES, EOS)


def ask(handle: int, num_prompt: int = 1, max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        handle=handle, request_id="", prompt_token_ids=(A,) * num_prompt, max_tokens=max_tokens, **fields
    )


def shape(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    """Kind, start and number of tokens of every row."""
    assert plan is not None
    return [("decode" if row.is_decode else "prefill", row.start, row.num_tokens) for row in plan.rows]


def step(scheduler: Scheduler, token_id: int = A, now_ns: int = 1) -> tuple[StepPlan, list[SingleEvent]]:
    """Plan and commit at once, every row drawing the same id."""
    plan = scheduler.plan(now_ns)
    assert plan is not None
    result = StepResult((token_id,) * sum(row.is_sampled for row in plan.rows))
    return plan, one_by_one(scheduler.commit(plan, result, now_ns))


def only(events: Sequence[Event]) -> TokenEvent:
    (event,) = events
    assert isinstance(event, TokenEvent)
    return event


def test_a_long_prompt_is_cut_into_chunks_and_then_decodes_once_a_step() -> None:
    scheduler = make_scheduler(max_step_tokens=32)
    scheduler.add(ask(1, num_prompt=70, max_tokens=3), 0)
    shapes = [shape(step(scheduler)[0]) for _ in range(5)]
    assert shapes == [
        [("prefill", 0, 32)],
        [("prefill", 32, 32)],
        [("prefill", 64, 6)],
        [("decode", 70, 1)],
        [("decode", 71, 1)],
    ]
    assert not scheduler.has_work


def test_decodes_come_first_and_prefills_share_what_is_left() -> None:
    scheduler = make_scheduler(max_step_tokens=10)
    scheduler.add(ask(1), 0)
    step(scheduler)
    scheduler.add(ask(2, num_prompt=6), 0)
    scheduler.add(ask(3, num_prompt=6), 0)
    assert shape(step(scheduler)[0]) == [("decode", 1, 1), ("prefill", 0, 6), ("prefill", 0, 3)]
    assert shape(step(scheduler)[0]) == [("decode", 2, 1), ("decode", 6, 1), ("prefill", 3, 3)]


def test_nothing_to_do_is_no_plan() -> None:
    assert make_scheduler().plan(0) is None


def test_the_last_token_is_in_flight_so_no_other_is_planned() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, max_tokens=1), 0)
    first = scheduler.plan(0)
    assert first is not None
    assert scheduler.plan(0) is None
    assert only(scheduler.commit(first, StepResult((A,)), 0)).finish is not None


def test_a_token_in_flight_behind_the_end_is_dropped_and_holds_its_pages_until_then() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1), 0)
    first, second = scheduler.plan(0), scheduler.plan(0)
    assert first is not None
    assert second is not None
    finish = only(scheduler.commit(first, StepResult((EOS,)), 0)).finish
    assert finish is not None
    assert finish.reason is FinishReason.STOP
    assert scheduler.stats().num_pages_held == 1
    assert scheduler.commit(second, StepResult((B,)), 0) == []
    assert scheduler.stats().num_pages_held == 0


def test_more_ids_than_sampled_rows_are_a_bug_of_the_runner() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1), 0)
    plan = scheduler.plan(0)
    assert plan is not None
    with pytest.raises(AssertionError, match="more ids than sampled rows"):
        scheduler.commit(plan, StepResult((A, A)), 0)


def test_a_full_queue_names_bound_and_number() -> None:
    scheduler = make_scheduler(max_queued_requests=2)
    scheduler.add(ask(1), 0)
    scheduler.add(ask(2), 0)
    with pytest.raises(QueueFull, match="the queue is full: 2 requests wait, max_queued_requests is 2"):
        scheduler.add(ask(3), 0)
    assert scheduler.stats().num_requests_waiting == 2


def test_too_many_waiting_tokens_are_refused_but_one_request_may_always_wait() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queued_tokens=10)
    scheduler.add(ask(1, num_prompt=20), 0)
    with pytest.raises(
        QueueFull, match="the queue is full: 20 prompt tokens wait and this request has 1, max_queued_tokens is 10"
    ):
        scheduler.add(ask(2), 0)
    step(scheduler)
    scheduler.add(ask(2, num_prompt=4), 0)
    scheduler.add(ask(3, num_prompt=6), 0)
    with pytest.raises(QueueFull, match="10 prompt tokens wait and this request has 1"):
        scheduler.add(ask(4), 0)
    scheduler.abort(3)
    scheduler.add(ask(4, num_prompt=6), 0)


def test_a_lower_priority_number_runs_first_and_equals_run_in_the_order_of_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for handle, priority in ((1, 0), (2, 0), (3, -1), (4, 2), (5, -1)):
        scheduler.add(ask(handle, max_tokens=1, priority=priority), handle)
    assert [only(step(scheduler)[1]).handle for _ in range(5)] == [3, 5, 1, 2, 4]


def test_a_prompt_is_scored_without_drawing_anything() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.add(ask(1, num_prompt=6, max_tokens=0, num_prompt_logprobs=0, echo=True), 0)
    scores = tuple(TokenLogProbs(-float(number), number) for number in range(1, 6))
    events: list[Event] = []
    for chunk in (scores[:4], scores[4:]):
        plan = scheduler.plan(1)
        assert plan is not None
        assert [(row.is_sampled, row.num_prompt_logprobs) for row in plan.rows] == [(False, 0)]
        events += scheduler.commit(plan, StepResult((), (), (chunk,)), 7)
    event = only(events)
    assert (event.token_ids, event.text_take_bytes, event.is_request_end) == ((A,) * 6, 6, True)
    assert event.finish is not None
    assert (event.finish.reason, event.finish.num_output_tokens) == (FinishReason.LENGTH, 0)
    assert event.finish.prompt_log_probs == scores
    assert not scheduler.has_work


def test_log_probabilities_reach_the_rows_they_belong_to() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1), 0)
    scheduler.add(ask(2, num_logprobs=2), 0)
    plan = scheduler.plan(0)
    assert plan is not None
    assert [row.slot_start.num_logprobs for row in plan.rows if row.slot_start] == [None, 2]
    given = TokenLogProbs(-0.5, 1, (A, B), (-0.5, -1.5))
    events = scheduler.commit(plan, StepResult((A, A), (None, given)), 0)
    assert [event.log_probs for event in events if isinstance(event, TokenEvent)] == [(), (given,)]


def test_a_deadline_is_an_error_before_the_first_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, deadline_ms=5), 1_000_000)
    assert scheduler.expire(5_999_999) == []
    (event,) = scheduler.expire(8_000_000)
    assert isinstance(event, RequestFailed)
    assert event.kind is FailureKind.DEADLINE
    assert event.message == "deadline_ms: nothing was generated within 5 ms; 7 ms have passed since arrival"
    assert not scheduler.has_work


def test_a_deadline_is_a_finish_reason_after_the_first_token() -> None:
    scheduler = make_scheduler(default_deadline_ms=5)
    scheduler.add(ask(1), 0)
    step(scheduler)
    event = only(scheduler.expire(5_000_000))
    assert event.finish is not None
    assert (event.finish.reason, event.finish.num_output_tokens, event.is_request_end) == (
        FinishReason.DEADLINE,
        1,
        True,
    )


def test_an_abort_sends_the_text_that_was_held_back() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, stop_strings=(b"ab",)), 0)
    assert only(step(scheduler, A)[1]).text_ids == ()
    event = only(scheduler.abort(1))
    assert (event.token_ids, event.text_ids, event.text_take_bytes) == ((), (A,), 1)
    assert scheduler.abort(1) == [], "the second abort crosses the end"


def test_samples_of_one_request_wait_for_slots_and_end_together() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add(ask(1, max_tokens=1, num_return_sequences=3), 0)
    _, events = step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 1)
    events += step(scheduler)[1]
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [(event.sequence_index, event.is_request_end) for event in tokens] == [(0, False), (1, False), (2, True)]


def test_the_head_of_the_queue_is_not_overtaken_by_what_would_fit() -> None:
    scheduler = make_scheduler(num_pages=3, max_step_tokens=256)
    scheduler.add(ask(1, num_prompt=64), 0)
    scheduler.add(ask(2, num_prompt=128), 0)
    scheduler.add(ask(3), 0)
    plan, _ = step(scheduler)
    assert [row.slot_start.prompt_token_ids for row in plan.rows if row.slot_start] == [(A,) * 64]
    assert scheduler.stats().num_requests_waiting == 2


def test_the_echo_comes_with_the_first_token_and_its_text_is_never_a_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, num_prompt=2, stop_strings=(b"aa",), echo=True), 0)
    event = only(step(scheduler, A)[1])
    assert (event.token_ids, event.text_ids, event.text_take_bytes) == ((A, A, A), (A, A), 2)


def test_a_control_id_closes_its_response_and_keeps_characters_apart() -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, ignore_eos=True), 0)
    assert not only(step(scheduler, LEAD)[1]).is_closed
    event = only(step(scheduler, CONTROL)[1])
    assert (event.token_ids, event.text_ids, event.is_closed) == ((CONTROL,), (LEAD, CONTROL), True)
    assert only(step(scheduler, TAIL)[1]).text_ids == (TAIL,)


@pytest.mark.parametrize(
    ("fields", "token_ids", "reason", "stop_reason"),
    [
        ({}, [A, EOS], FinishReason.STOP, ""),
        ({"ignore_eos": True, "max_tokens": 3}, [EOS, EOS, EOS], FinishReason.LENGTH, ""),
        ({"end_id": B}, [EOS, B], FinishReason.STOP, ""),
        ({"stop_token_ids": (B,)}, [A, B], FinishReason.STOP, "3"),
        ({"stop_token_ids": (EOS,)}, [EOS], FinishReason.STOP, "1"),
        ({"stop_strings": (b"b", b"aab")}, [A, A, B], FinishReason.STOP, "aab"),
        ({"stop_strings": (b"a",), "min_tokens": 3}, [A, A, A], FinishReason.STOP, "a"),
        ({"stop_strings": (b"b",), "stop_token_ids": (B,)}, [B], FinishReason.STOP, "b"),
    ],
)
def test_why_a_sequence_ends(
    fields: dict[str, Any], token_ids: list[int], reason: FinishReason, stop_reason: str
) -> None:
    scheduler = make_scheduler()
    scheduler.add(ask(1, **fields), 0)
    finishes = [only(step(scheduler, token_id)[1]).finish for token_id in token_ids]
    assert finishes[:-1] == [None] * (len(token_ids) - 1)
    assert finishes[-1] is not None
    assert (finishes[-1].reason, finishes[-1].stop_reason) == (reason, stop_reason)
    assert finishes[-1].num_output_tokens == len(token_ids)


def test_every_running_sequence_must_fit_into_one_step() -> None:
    with pytest.raises(AssertionError, match="every running sequence must fit"):
        make_scheduler(max_num_seqs=33, max_step_tokens=32)
