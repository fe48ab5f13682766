"""Random traces: whatever arrives, is taken back or runs late, every request gets its own answer, once and whole."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.engine.plan import PAGE_TOKENS
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import SchedulerLimits
from backend.engine.sequence import RequestGroup, Sequence
from tests.engine.device import VOCAB_SIZE
from tests.engine.grammar import guide_spec
from tests.engine.trace import Abort, AbortAll, AbortRequestId, Add, Order, Pass, Trace

MAX_REQUESTS = 10
MIN_PAGES = 4
AMPLE_PAGES = 256
"""More than all requests of a trace can have: nobody waits for a page, and none is ever taken for something else."""
MOST_COMPILE_TURNS = 3
NUM_EXAMPLES = 200
ROOMY = SchedulerLimits(num_pages=16, max_num_seqs=4, max_step_tokens=1000, max_queued_requests=4)
ROUND = settings(max_examples=NUM_EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
GUIDES = ["2,3 =4 =5 =6 7,8 =9", "=2 =3 =4 =5", "2,3,4 2,3,4", "=4 =3 2,8 " + "=2 " * 70]


@st.composite
def request_fields(draw: st.DrawFn) -> dict[str, Any]:
    max_tokens = draw(st.sampled_from([1, 2, 3, 5, 12, 80]))
    num_prompt = draw(st.sampled_from([1, 2, 5, 53, 63, 64, 65, 110, 128, 130]))
    base = draw(st.sampled_from([3, 3, 7]))
    fields: dict[str, Any] = {
        "request_id": draw(st.sampled_from(["", "a", "b"])),
        "prompt_token_ids": tuple(number * base % VOCAB_SIZE for number in range(num_prompt)),
        "max_tokens": max_tokens,
        "num_return_sequences": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "stop_strings": tuple(draw(st.lists(st.sampled_from([b"ab", b"a", b"ba.", "中".encode()]), max_size=2))),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2))),
        "deadline_ms": draw(st.sampled_from([None, None, None, 1, 3, 8])),
        "echo": draw(st.booleans()),
        "stream": draw(st.booleans()),
        "priority": draw(st.sampled_from([0, 0, 0, -1, 2])),
        "cache_salt": draw(st.sampled_from(["", "", "other"])),
        "num_logprobs": draw(st.sampled_from([None, None, 0, 2])),
        "num_prompt_logprobs": draw(st.sampled_from([None, None, None, 0, 1])),
    }
    if draw(st.sampled_from([False, False, True])):
        fields["guide"] = guide_spec(draw(st.sampled_from(GUIDES)))
        fields["stop_token_ids"] = ()
    else:
        fields |= {
            "min_tokens": draw(st.integers(0, max_tokens)),
            "end_id": draw(st.sampled_from([None, None, 3])),
            "ignore_eos": draw(st.sampled_from([True, True, False])),
        }
    if fields["num_prompt_logprobs"] is not None and draw(st.booleans()):
        fields |= {"max_tokens": 0, "min_tokens": 0}
    return fields


@st.composite
def limits_of_traces(draw: st.DrawFn) -> SchedulerLimits:
    max_num_seqs = draw(st.integers(1, 5))
    return SchedulerLimits(
        num_pages=draw(st.one_of(st.integers(MIN_PAGES, 9), st.just(AMPLE_PAGES))),
        num_host_pages=draw(st.sampled_from([0, 2, 5, 12])),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 7, 60, 300])),
        max_queued_requests=draw(st.sampled_from([1, 3, MAX_REQUESTS])),
        max_queued_tokens=draw(st.sampled_from([0, 0, 100])),
        default_deadline_ms=draw(st.sampled_from([0, 0, 20])),
        has_prefix_cache=draw(st.sampled_from([True, True, False])),
        max_unsent_tokens=draw(st.sampled_from([0, 0, 1, 5, 8, 20])),
        steady_from=draw(st.sampled_from([1, 1, 3])),
        caches_outputs=draw(st.sampled_from([True, True, False])),
    )


@st.composite
def traces(draw: st.DrawFn) -> tuple[SchedulerLimits, list[list[Order]]]:
    handles = st.integers(1, MAX_REQUESTS)
    other_orders = st.one_of(
        handles.map(Abort),
        st.sampled_from(["a", "b"]).map(AbortRequestId),
        st.sampled_from([1, 5, 30]).map(Pass),
        st.just(AbortAll()),
    )
    turns: list[list[Order]] = []
    handle = 0
    for kinds in draw(st.lists(st.lists(st.sampled_from(["add", "add", "add", "other"]), max_size=3), max_size=12)):
        orders: list[Order] = []
        for kind in kinds:
            if kind == "add" and handle < MAX_REQUESTS:
                handle += 1
                request = GenerationRequest(
                    handle=handle, sampling=SamplingParams(temperature=1.0, seed=handle), **draw(request_fields())
                )
                request.validate(VOCAB_SIZE, MIN_PAGES * PAGE_TOKENS)
                orders.append(Add(request))
            else:
                orders.append(draw(other_orders))
        turns.append(orders)
    return draw(limits_of_traces()), turns


def without_hurry(turns: list[list[Order]]) -> list[list[Order]]:
    """Only the arrivals, and no deadlines: then every answer is the sequence's own."""
    return [[Add(replace(o.request, deadline_ms=None)) for o in orders if isinstance(o, Add)] for orders in turns]


def answers(trace: Trace) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Per sequence what came out, whatever the moment."""
    return {
        (handle, index): (trace.ids_of(handle, index), finish.reason, finish.stop_reason, finish.prompt_log_probs)
        for handle, request in trace.requests.items()
        for index in range(request.num_return_sequences)
        for finish in [trace.finish_of(handle, index)]
    }


@ROUND
@given(trace=traces(), num_steps_ahead=st.sampled_from([1, 1, 1, 0]))
def test_every_request_is_answered_once_and_whole(
    trace: tuple[SchedulerLimits, list[list[Order]]], num_steps_ahead: int
) -> None:
    limits, turns = trace
    Trace(limits, num_steps_ahead, MOST_COMPILE_TURNS).play(turns)


@settings(ROUND, max_examples=NUM_EXAMPLES // 2)
@given(trace=traces())
def test_the_same_trace_gives_the_same_plans(trace: tuple[SchedulerLimits, list[list[Order]]]) -> None:
    limits, turns = trace
    first, second = Trace(limits, 1, MOST_COMPILE_TURNS), Trace(limits, 1, MOST_COMPILE_TURNS)
    first.play(turns)
    second.play(turns)
    assert first.plans == second.plans
    assert first.events == second.events


@settings(ROUND, max_examples=NUM_EXAMPLES // 2)
@given(trace=traces(), others=st.lists(limits_of_traces(), min_size=2, max_size=2))
def test_answers_do_not_depend_on_limits_or_company(
    trace: tuple[SchedulerLimits, list[list[Order]]], others: list[SchedulerLimits]
) -> None:
    """Pool, host pages, budget, prefix cache and steps ahead change no id; nor does being served alone."""
    turns = without_hurry(trace[1])
    together = []
    for limits, num_steps_ahead in zip([trace[0], *others], (1, 0, 1), strict=True):
        patient = replace(limits, max_queued_requests=MAX_REQUESTS, max_queued_tokens=0, default_deadline_ms=0)
        played = Trace(patient, num_steps_ahead, MOST_COMPILE_TURNS)
        played.play(turns)
        together.append(answers(played))
    alone: dict[tuple[int, int], tuple[Any, ...]] = {}
    for order in (order for orders in turns for order in orders):
        single = Trace(ROOMY, 1)
        single.play([[order]])
        alone |= answers(single)
    assert together == [alone] * len(together)


@settings(ROUND, max_examples=NUM_EXAMPLES // 4)
@given(trace=traces(), num_steps_ahead=st.sampled_from([2, 3]))
def test_steps_may_run_further_ahead_without_guides(
    trace: tuple[SchedulerLimits, list[list[Order]]], num_steps_ahead: int
) -> None:
    limits, turns = trace
    kept = [[o for o in orders if not isinstance(o, Add) or o.request.guide is None] for orders in turns]
    Trace(limits, num_steps_ahead).play(kept)


def random_load(seed: int) -> tuple[SchedulerLimits, list[list[Order]]]:
    """More requests than hypothesis likes to make, with common beginnings, on few pages."""
    chance = random.Random(seed)
    num_pages, max_num_seqs = chance.randint(4, 12), chance.randint(2, 6)
    limits = SchedulerLimits(
        num_pages=num_pages,
        num_host_pages=chance.choice([2, num_pages, 3 * num_pages]),
        max_num_seqs=max_num_seqs,
        max_step_tokens=chance.randint(max_num_seqs, 200),
        max_queued_requests=30,
        has_prefix_cache=chance.random() < 0.8,
        max_unsent_tokens=chance.choice([0, 0, 8]),
        steady_from=1,
    )
    bases = [tuple(chance.choices(range(VOCAB_SIZE), k=220)) for _ in range(3)]
    turns: list[list[Order]] = []
    for handle in range(30):
        prompt = (*chance.choice(bases)[: chance.randint(1, 160)], *chance.choices(range(VOCAB_SIZE), k=10))
        request = GenerationRequest(
            handle,
            "",
            prompt,
            chance.randint(1, num_pages * PAGE_TOKENS - len(prompt)) if chance.random() < 0.3 else 40,
            sampling=SamplingParams(seed=handle),
            num_return_sequences=chance.choice([1, 1, 1, 3]),
            ignore_eos=True,
            stream=chance.choice([False, True]),
            stop_token_ids=chance.choice([(), (), (3,)]),
            priority=chance.choice([0, 0, 0, -1, 2]),
        )
        abort: list[Order] = [Abort(chance.randrange(30))] if chance.random() < 0.2 else []
        turns += [[Add(request), *abort], *[[] for _ in range(chance.choice([0, 0, 3, 20]))]]
    return limits, turns


def test_what_has_ended_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for seed in range(3):
            limits, turns = random_load(seed)
            trace = Trace(limits, 1)
            trace.play(turns)
            assert trace.requests
        assert not [each for each in gc.get_objects() if type(each) in (Sequence, RequestGroup)]
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(12))
def test_a_load_that_is_far_too_much_is_served_whole(seed: int) -> None:
    limits, turns = random_load(seed)
    Trace(limits, 1).play(turns)
