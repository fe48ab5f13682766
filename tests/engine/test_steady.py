"""Sequences as columns: plans and answers are those of sequences that are looked at one by one, and most need no look."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.engine.events import Finish, FinishReason, PlainTokens, TokenEvent, one_by_one
from backend.engine.plan import PAGE_TOKENS, PlanRow, StepPlan, StepResult
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.engine.steady import SteadySequences
from tests.engine.test_scheduler_traces import MOST_COMPILE_TURNS, ROUND, traces
from tests.engine.trace import Order, Trace

TOKEN_BYTES = (b"", b"", b"a", b"b", b"\xc3", b"\xa9")
CONTROL, EOS, A, B, LEAD, TAIL = range(6)
AMPLE = SchedulerLimits(num_pages=64, max_num_seqs=4, max_step_tokens=256, max_queued_requests=8, steady_from=1)
SCARCE = dataclasses.replace(AMPLE, num_pages=8)


def rows_by_slot(plan: StepPlan, *, with_pages: bool) -> list[PlanRow]:
    rows = sorted(plan.rows, key=lambda row: row.slot)
    return rows if with_pages else [msgspec.structs.replace(row, page_ids=()) for row in rows]


@pytest.mark.parametrize("turns_pages", [False, True])
@ROUND
@given(trace=traces(), num_steps_ahead=st.sampled_from([1, 1, 0]))
def test_nothing_depends_on_who_is_steady(
    turns_pages: bool, trace: tuple[SchedulerLimits, list[list[Order]]], num_steps_ahead: int
) -> None:
    """With every sequence looked at one by one: the same plans and events; pages too, unless steady ones take theirs first.

    No two sequences of a trace are the same to their ends, else which of two equal pages is found later would be open.
    """
    limits, turns = trace
    one_by_one, steady = (Trace(limits, num_steps_ahead, MOST_COMPILE_TURNS) for _ in range(2))
    with patch.object(SteadySequences, "join", lambda *_: False):
        one_by_one.play(turns)
    if turns_pages:
        steady.play(turns)
    else:
        with patch.object(Scheduler, "_turn_page", lambda *_: False):
            steady.play(turns)
    assert steady.events == one_by_one.events
    assert [rows_by_slot(plan, with_pages=not turns_pages) for plan in steady.plans] == [
        rows_by_slot(plan, with_pages=not turns_pages) for plan in one_by_one.plans
    ]
    assert turns_pages or [plan.copies for plan in steady.plans] == [plan.copies for plan in one_by_one.plans]


class Run:
    """One step ahead, with chosen ids."""

    def __init__(self, limits: SchedulerLimits, num_requests: int = 1, **fields: Any) -> None:
        self.scheduler = Scheduler(limits, TOKEN_BYTES, EOS)
        for handle in range(1, num_requests + 1):
            request = GenerationRequest(handle, "", (A,) * 10, **{"max_tokens": 200, "stream": True} | fields)
            self.scheduler.add(request, 0)
        self.now_ns = 0
        self.plans: list[StepPlan] = []
        self.events: list[TokenEvent] = []
        self._in_flight: StepPlan | None = None

    def turn(self, token_id: int = A) -> StepPlan | None:
        """Plan, then commit the step before."""
        self.now_ns += 1
        plan = self.scheduler.plan(self.now_ns)
        if self._in_flight is not None:
            self.commit(token_id)
        self._in_flight = plan
        if plan is not None:
            self.plans.append(plan)
        self.scheduler.check_integrity()
        return plan

    @property
    def is_in_flight(self) -> bool:
        return self._in_flight is not None

    def commit(self, token_id: int) -> None:
        assert self._in_flight is not None
        num_drawn = sum(row.is_sampled for row in self._in_flight.rows)
        events = self.scheduler.commit(self._in_flight, StepResult((token_id,) * num_drawn), self.now_ns)
        self.events += [event for event in one_by_one(events) if isinstance(event, TokenEvent)]

    def ids(self) -> list[int]:
        return [token_id for event in self.events for token_id in event.token_ids]

    def finish(self) -> Finish:
        (finish,) = [event.finish for event in self.events if event.finish is not None]
        return finish


@pytest.mark.parametrize("limits", [AMPLE, SCARCE])
def test_a_sequence_that_decodes_is_a_column_until_its_last_row(limits: SchedulerLimits) -> None:
    run = Run(limits)
    while run.turn() is not None:
        pass
    assert run.ids() == [A] * 200
    assert run.finish().num_output_tokens == 200
    assert run.finish().reason is FinishReason.LENGTH
    is_column = [len(plan.steady) == 1 for plan in run.plans]
    assert is_column == [False] * 2 + [True] * 197 + [False], "the first id must be known, and the last row is special"
    assert [row.start for plan in run.plans[1:] for row in plan.rows] == list(range(10, 209))
    assert {len(plan.rows[0].page_ids) for plan in run.plans} == {1, 2, 3, 4}


def test_columns_are_the_same_objects_until_something_changes() -> None:
    run = Run(AMPLE, num_requests=2)
    for _ in range(10):
        run.turn()
    before, after = run.plans[-2].steady, run.plans[-1].steady
    assert before.slots is after.slots
    assert before.page_ids is after.page_ids
    assert before != after
    run.scheduler.abort(1)
    run.turn()
    assert len(run.plans[-1].steady) == 1
    assert len(before) == len(before.rows()) == 2, "a plan stays as it was made"


@pytest.mark.parametrize("token_id", [LEAD, CONTROL])
def test_an_id_without_text_of_its_own_is_looked_at(token_id: int) -> None:
    run = Run(AMPLE)
    for _ in range(10):
        run.turn()
    run.turn(token_id)
    assert run.events[-1].token_ids == (token_id,)
    assert run.events[-1].text.take_bytes == 0
    assert run.events[-1].is_closed == (token_id == CONTROL)
    for _ in range(5):
        run.turn(TAIL if token_id == LEAD else A)
    assert run.ids()[8:] == [A, token_id, *[TAIL if token_id == LEAD else A] * 5]
    assert len(run.plans[-1].steady) == 1, "it came back"


def test_an_end_in_a_column_is_an_end() -> None:
    run = Run(AMPLE)
    for _ in range(10):
        run.turn()
    assert len(run.plans[-1].steady) == 1
    run.turn(EOS)
    assert (run.finish().reason, run.finish().num_output_tokens) == (FinishReason.STOP, 10)
    assert run.turn() is None, "the row in flight behind it is dropped"
    assert not run.scheduler.has_work
    assert run.ids() == [A] * 9 + [EOS]


def test_a_request_that_is_taken_back_knows_how_far_it_came() -> None:
    run = Run(AMPLE)
    for _ in range(30):
        run.turn()
    (event,) = run.scheduler.abort(1)
    assert isinstance(event, TokenEvent)
    assert event.finish is not None
    assert event.finish.num_output_tokens == len(run.ids()) == 29
    assert event.finish.last_token_time_ns == run.now_ns
    assert run.turn() is None
    assert not run.scheduler.has_work


@pytest.mark.parametrize(
    ("fields", "is_column"),
    [
        ({"ignore_eos": True}, True),
        ({"stop_token_ids": (EOS,)}, True),
        ({"stop_token_ids": (B,)}, False),
        ({"stop_strings": (b"ab",)}, False),
        ({"num_logprobs": 0}, False),
        ({"num_return_sequences": 2}, False),
    ],
)
def test_what_needs_a_look_is_no_column(fields: dict[str, Any], is_column: bool) -> None:
    run = Run(AMPLE, **fields)
    for _ in range(10):
        run.turn()
    assert (len(run.plans[-1].steady) > 0) == is_column


@pytest.mark.parametrize("max_unsent_tokens", [5, 9, 20, 63, 64, 65, 100, 130])
@pytest.mark.parametrize("limits", [AMPLE, SCARCE])
def test_a_column_pauses_where_its_client_is_behind(limits: SchedulerLimits, max_unsent_tokens: int) -> None:
    """As far as a sequence that is looked at in each step, and not a token or a page further."""

    def played(is_steady: bool) -> list[tuple[int, int]]:
        run = Run(dataclasses.replace(limits, max_unsent_tokens=max_unsent_tokens, steady_from=1 if is_steady else 9))
        paused = []
        while run.scheduler.has_work:
            while run.turn() is not None or run.is_in_flight:
                pass
            paused.append((len(run.ids()), run.scheduler.stats().num_pages_held))
            run.scheduler.note_sent({1: 7})
        assert any(len(plan.steady) for plan in run.plans) == is_steady
        return paused

    paused = played(is_steady=True)
    assert paused == played(is_steady=False)
    # What is in flight when the bound is reached still counts.
    assert paused[0][0] in (max_unsent_tokens, max_unsent_tokens + 1)
    assert paused[-1][0] == 200


def test_full_pages_of_columns_are_found_by_prompts() -> None:
    run = Run(AMPLE)
    while run.turn() is not None:
        pass
    run.scheduler.add(GenerationRequest(2, "", (A,) * 150, 1), 0)
    while run.turn() is not None or run.is_in_flight:
        pass
    assert run.events[-1].finish is not None
    assert run.events[-1].finish.num_cached_tokens == 2 * PAGE_TOKENS


def test_few_sequences_are_no_columns() -> None:
    run = Run(dataclasses.replace(AMPLE, steady_from=2), num_requests=2)
    for _ in range(10):
        run.turn()
    assert len(run.plans[-1].steady) == 2
    run.scheduler.abort(1)
    for _ in range(PAGE_TOKENS):
        run.turn()
    assert len(run.plans[-1].steady) == 0, "it left when its page was full"


def test_columns_of_events_are_events() -> None:
    plain = PlainTokens([2**63 + 1, 2], [A, B], [1, 2])
    assert one_by_one([plain]) == [
        TokenEvent(2**63 + 1, 0, (A,), (A,), 0, 1, False, None),
        TokenEvent(2, 0, (B,), (B,), 0, 2, False, None),
    ]


def test_a_page_is_turned_in_place_where_there_are_enough() -> None:
    run = Run(AMPLE, num_requests=2)
    with patch.object(SteadySequences, "leave", side_effect=AssertionError("it left")):
        for _ in range(3 * PAGE_TOKENS):
            run.turn()
    assert [len(page_ids) for page_ids in run.plans[-1].steady.page_ids] == [4, 4]
