"""Random traces: whatever arrives, is taken back or runs late, every request gets its own answer, once and whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from tests.engine.device import VOCAB_SIZE
from tests.engine.trace import Abort, AbortAll, AbortRequestId, Add, Order, Pass, Trace

MAX_REQUESTS = 10
MIN_PAGES = 3
ROUND = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def request_fields(draw: st.DrawFn) -> dict[str, Any]:
    max_tokens = draw(st.integers(1, 12))
    num_prompt = draw(st.sampled_from([1, 2, 5, 53, 63, 64, 65, 120, 180]))
    prompt = tuple((number * 7 + num_prompt) % VOCAB_SIZE for number in range(num_prompt))
    return {
        "request_id": draw(st.sampled_from(["", "a", "b"])),
        "prompt_token_ids": prompt,
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, max_tokens)),
        "num_return_sequences": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "stop_strings": tuple(draw(st.lists(st.sampled_from([b"ab", b"a", b"ba.", "中".encode()]), max_size=2))),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2))),
        "end_id": draw(st.sampled_from([None, None, 3])),
        "ignore_eos": draw(st.booleans()),
        "deadline_ms": draw(st.sampled_from([None, None, None, 1, 3, 8])),
        "echo": draw(st.booleans()),
    }


@st.composite
def traces(draw: st.DrawFn) -> tuple[SchedulerLimits, int, list[list[Order]]]:
    max_num_seqs = draw(st.integers(1, 5))
    limits = SchedulerLimits(
        num_pages=draw(st.integers(MIN_PAGES, 12)),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 7, 60, 300])),
        max_queued_requests=draw(st.sampled_from([1, 3, MAX_REQUESTS])),
        default_deadline_ms=draw(st.sampled_from([0, 0, 20])),
    )
    handles = st.integers(1, MAX_REQUESTS)
    other_orders = st.one_of(
        handles.map(Abort),
        st.sampled_from(["a", "b"]).map(AbortRequestId),
        st.sampled_from([1, 5, 30]).map(Pass),
        st.just(AbortAll()),
    )
    turns: list[list[Order]] = []
    handle = 0
    for kinds in draw(st.lists(st.lists(st.sampled_from(["add", "add", "other"]), max_size=3), max_size=12)):
        orders: list[Order] = []
        for kind in kinds:
            if kind == "add" and handle < MAX_REQUESTS:
                handle += 1
                sampling = SamplingParams(temperature=1.0, seed=handle * 1000)
                orders.append(Add(GenerationRequest(handle=handle, sampling=sampling, **draw(request_fields()))))
            else:
                orders.append(draw(other_orders))
        turns.append(orders)
    return limits, draw(st.sampled_from([1, 1, 1, 0, 2, 3])), turns


@ROUND
@given(trace=traces())
def test_every_request_is_answered_once_and_whole(trace: tuple[SchedulerLimits, int, list[list[Order]]]) -> None:
    limits, num_steps_ahead, turns = trace
    Trace(limits, num_steps_ahead).play(turns)


@settings(ROUND, max_examples=100)
@given(trace=traces())
def test_the_same_trace_gives_the_same_plans(trace: tuple[SchedulerLimits, int, list[list[Order]]]) -> None:
    limits, num_steps_ahead, turns = trace
    first, second = Trace(limits, num_steps_ahead), Trace(limits, num_steps_ahead)
    first.play(turns)
    second.play(turns)
    assert first.plans == second.plans
    assert first.events == second.events


@settings(ROUND, max_examples=100)
@given(trace=traces())
def test_how_far_ahead_steps_run_changes_no_answer(trace: tuple[SchedulerLimits, int, list[list[Order]]]) -> None:
    """Without aborts and deadlines, whose effect depends on the moment, every answer is the sequence's own."""
    limits, _, turns = trace
    unhurried = SchedulerLimits(limits.num_pages, limits.max_num_seqs, limits.max_step_tokens, MAX_REQUESTS)
    adds = [order for orders in turns for order in orders if isinstance(order, Add)]
    kept = [[order] for order in adds if order.request.deadline_ms is None]
    answers = []
    for num_steps_ahead in (0, 1, 3):
        played = Trace(unhurried, num_steps_ahead)
        played.play(kept)
        answers.append({handle: Counter(map(_content, events)) for handle, events in played.events.items()})
    assert answers[0] == answers[1] == answers[2]


def _content(event: Any) -> tuple[Any, ...]:
    return (event.sequence_index, event.token_ids, event.text, event.finish and event.finish.reason)
