"""Plays a trace of arrivals, aborts and time against a Scheduler, with steps in flight, and checks every moment of it."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from backend.engine.events import (
    Event,
    FailureKind,
    Finish,
    FinishReason,
    RequestFailed,
    SingleEvent,
    TokenEvent,
    one_by_one,
)
from backend.engine.plan import PAGE_TOKENS, StepPlan
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.errors import QueueFull
from tests.engine.device import EOS_ID, TOKEN_BYTES, Device, DeviceStep
from tests.engine.grammar import compile_places
from tests.engine.sequence_oracle import expected_outputs, expected_prompt_log_probs
from tests.engine.text_oracle import Output, allowed_text, decode_cut

TURN_NS = 1_000_000
_TURNS_PER_REPORT = 3
"""So often is it told what clients were sent: everything there was."""


class Add(NamedTuple):
    """A request arrives."""

    request: GenerationRequest


class Abort(NamedTuple):
    """A handle is taken back, known or not."""

    handle: int


class AbortRequestId(NamedTuple):
    """A client's request id is taken back."""

    request_id: str


class AbortAll(NamedTuple):
    """Everything is taken back."""


class Pass(NamedTuple):
    """Time passes between two turns."""

    milliseconds: int


Order = Add | Abort | AbortRequestId | AbortAll | Pass


def _is_deadline(event: SingleEvent) -> bool:
    if isinstance(event, RequestFailed):
        return event.kind is FailureKind.DEADLINE
    return event.finish is not None and event.finish.reason is FinishReason.DEADLINE


class Trace:
    """One run. `num_steps_ahead` 1 is the engine's own order: plan(t + 1), launch(t + 1), commit(t), draw what needs masks.

    Guides need the ids of the step before, so not more than one step ahead. A guide is compiled for up to
    `most_compile_turns`, which depends on its request's handle.
    """

    def __init__(self, limits: SchedulerLimits, num_steps_ahead: int, most_compile_turns: int = 0) -> None:
        self.scheduler = Scheduler(limits, TOKEN_BYTES, EOS_ID)
        self.device = Device(limits.num_pages, limits.max_num_seqs, limits.num_host_pages)
        self.plans: list[StepPlan] = []
        self.requests: dict[int, GenerationRequest] = {}
        self.arrivals_ns: dict[int, int] = {}
        self.events: dict[int, list[SingleEvent]] = {}
        self.aborted: set[int] = set()
        self.unsent: Counter[int] = Counter()
        self.now_ns = 1_000_000_000
        self._num_turns = 0
        self._num_steps_ahead = num_steps_ahead
        self._most_compile_turns = most_compile_turns
        self._compiling: dict[int, int] = {}
        self._in_flight: deque[tuple[StepPlan, DeviceStep]] = deque()

    def play(self, turns: Sequence[Sequence[Order]]) -> None:
        """Carry out the orders, one list a turn, then go on until nothing is left."""
        for orders in turns:
            self.turn(orders)
        most_turns = self._most_steps_left() + self._num_steps_ahead + 2 + self._most_compile_turns
        most_turns *= _TURNS_PER_REPORT if self.scheduler.limits.max_unsent_tokens else 1
        num_turns = 0
        while self.scheduler.has_work or self._in_flight or self._compiling:
            num_turns += 1
            assert num_turns <= most_turns, f"not ready after {most_turns} turns: a request starves"
            self.turn(())
        self._check_end()

    def turn(self, orders: Sequence[Order]) -> None:
        """One turn of the engine loop."""
        self.now_ns += TURN_NS
        self._num_turns += 1
        if self._num_turns % _TURNS_PER_REPORT == 0:
            self.scheduler.note_sent(dict(self.unsent))
            self.unsent.clear()
        for order in orders:
            self._carry_out(order)
        self._compile()
        self._record(self.scheduler.expire(self.now_ns))
        for handle in self.requests:
            assert self.is_ended(handle) or self._deadline_ns(handle) > self.now_ns, "the deadline was overlooked"
        plan = self.scheduler.plan(self.now_ns)
        undrawn: tuple[StepPlan, DeviceStep] | None = None
        if plan is not None:
            self._check_plan(plan)
            self.plans.append(plan)
            step = self.device.launch(plan)
            if plan.needs_masks and self._in_flight:
                undrawn = plan, step
            else:
                step.draw(self.scheduler.masks(plan))
            self._in_flight.append((plan, step))
        elif not self._in_flight:
            assert not self.scheduler.has_work or self._somebody_pauses(), (
                "nothing is in flight and nothing can run: the engine would turn for ever"
            )
        if len(self._in_flight) > (self._num_steps_ahead if plan is not None else 0):
            committed, finished = self._in_flight.popleft()
            self._record(self.scheduler.commit(committed, finished.result(), self.now_ns))
        if undrawn is not None:
            undrawn[1].draw(self.scheduler.masks(undrawn[0]))
        self.scheduler.check_integrity()
        self._check_stats()

    def is_ended(self, handle: int) -> bool:
        """Whether the request has had its last event."""
        events = self.events[handle]
        return bool(events) and (isinstance(events[-1], RequestFailed) or events[-1].is_request_end)

    def ids_of(self, handle: int, index: int = 0) -> tuple[int, ...]:
        """Ids of one sequence so far, its echo too."""
        tokens = [event for event in self.events[handle] if isinstance(event, TokenEvent)]
        return tuple(i for event in tokens if event.sequence_index == index for i in event.token_ids)

    def finish_of(self, handle: int, index: int = 0) -> Finish:
        """How a sequence ended."""
        tokens = [event for event in self.events[handle] if isinstance(event, TokenEvent)]
        (finish,) = [event.finish for event in tokens if event.sequence_index == index and event.finish is not None]
        return finish

    def _carry_out(self, order: Order) -> None:
        match order:
            case Add(request):
                self._add(request)
            case Abort(handle):
                self._mark_aborted({handle} & set(self.requests))
                self._record(self.scheduler.abort(handle))
                assert handle not in self.requests or self.is_ended(handle), "an abort ends the request at once"
            case AbortRequestId(request_id):
                self._mark_aborted(
                    {handle for handle, asked in self.requests.items() if asked.request_id == request_id}
                )
                self._record(self.scheduler.abort_request_id(request_id))
            case AbortAll():
                self._mark_aborted(set(self.requests))
                self._record(self.scheduler.abort_all())
                assert all(map(self.is_ended, self.requests)), "nothing is left"
            case Pass(milliseconds):
                self.now_ns += milliseconds * 1_000_000

    def _deadline_ns(self, handle: int) -> float:
        deadline_ms = self.requests[handle].deadline_ms or self.scheduler.limits.default_deadline_ms
        return self.arrivals_ns[handle] + deadline_ms * 1_000_000 if deadline_ms else math.inf

    def _mark_aborted(self, handles: set[int]) -> None:
        self.aborted |= {handle for handle in handles if not self.is_ended(handle)}

    def _add(self, request: GenerationRequest) -> None:
        num_waiting = self.scheduler.stats().num_requests_waiting
        limit, token_limit = self.scheduler.limits.max_queued_requests, self.scheduler.limits.max_queued_tokens
        compile_turns = request.handle % (self._most_compile_turns + 1)
        guide = None if request.guide is None or compile_turns else compile_places(request.guide)
        try:
            self.scheduler.add(request, self.now_ns, guide)
        except QueueFull:
            assert num_waiting == limit or (token_limit and num_waiting), "refused although there was room"
            return
        assert num_waiting < limit, "taken although the queue was full"
        self.requests[request.handle] = request
        self.arrivals_ns[request.handle] = self.now_ns
        self.events[request.handle] = []
        if request.guide is not None and guide is None:
            self._compiling[request.handle] = compile_turns

    def _compile(self) -> None:
        """Guides become ready in the order in which they were asked for or another; the request may have ended meanwhile."""
        for handle in list(self._compiling):
            self._compiling[handle] -= 1
            if self._compiling[handle] < 0:
                del self._compiling[handle]
                guide = self.requests[handle].guide
                assert guide is not None
                assert self.scheduler.is_listed(handle) != self.is_ended(handle)
                self._record(self.scheduler.give_guide(handle, compile_places(guide)))

    def _record(self, events: list[Event]) -> None:
        for event in one_by_one(events):
            assert not self.is_ended(event.handle), "nothing comes behind the end of a request"
            if _is_deadline(event):
                assert self._deadline_ns(event.handle) <= self.now_ns, "ended before its deadline"
            if isinstance(event, TokenEvent):
                request = self.requests[event.handle]
                is_echo = request.echo and bool(event.token_ids) and not self.ids_of(event.handle, event.sequence_index)
                self.unsent[event.handle] += len(event.token_ids) - (len(request.prompt_token_ids) if is_echo else 0)
                self._check_unsent(request)
            self.events[event.handle].append(event)

    def _somebody_pauses(self) -> bool:
        most = self.scheduler.limits.max_unsent_tokens
        return bool(most) and any(count >= most and not self.is_ended(handle) for handle, count in self.unsent.items())

    def _check_unsent(self, request: GenerationRequest) -> None:
        """A stream is ahead by no more than the bound and the steps that were planned before it was reached."""
        most = self.scheduler.limits.max_unsent_tokens * request.num_return_sequences
        if most and request.stream and request.guide is None:
            slack = (self._num_steps_ahead + 1) * request.num_return_sequences
            assert self.unsent[request.handle] <= most + slack, "the stream runs away from its client"

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.scheduler.limits
        assert plan.step == len(self.plans)
        assert plan.rows
        assert 0 < plan.num_tokens <= limits.max_step_tokens
        kinds = [row.is_decode or row.num_forced > 0 for row in plan.rows]
        assert kinds == sorted(kinds, reverse=True), "decode rows first"
        slots = [row.slot for row in plan.rows]
        assert len(slots) == len(set(slots)), "a sequence has one row a step"
        for row in plan.rows:
            assert not row.num_forced or row.is_guided
        if not limits.num_host_pages:
            assert not plan.copies
            self._check_decodes_go_on(set(slots))

    def _check_decodes_go_on(self, planned: set[int]) -> None:
        """Without host pages every sequence was promised its device pages: it never rests."""
        wanted = {
            (request.sampling.seed, request.prompt_token_ids): request.max_tokens
            for handle, request in self.requests.items()
            if not self.is_ended(handle) and request.num_return_sequences == 1
            if not (request.stream and self.scheduler.limits.max_unsent_tokens)
        }
        for number, slot in self.device.slots.items():
            most = wanted.get((slot.start.sampling.seed, slot.start.prompt_token_ids), 0)
            if 0 < slot.num_outputs < most and slot.num_run >= len(slot.start.prompt_token_ids):
                assert number in planned, "a decoding sequence was left out of a step"

    def _check_stats(self) -> None:
        stats, limits = self.scheduler.stats(), self.scheduler.limits
        unanswered = sum(not self.is_ended(handle) for handle in self.requests)
        assert stats.num_requests_running + stats.num_requests_waiting >= unanswered
        assert stats.num_requests_waiting <= min(unanswered, limits.max_queued_requests)
        assert stats.num_requests_running <= limits.max_num_seqs
        assert (stats.num_pages, stats.num_steps) == (limits.num_pages, len(self.plans))
        assert stats.num_pages_held == 0 or stats.num_requests_running > 0
        assert stats.num_pages_held + stats.num_pages_cached <= limits.num_pages

    def _most_steps_left(self) -> int:
        """At least one token of work is done in every step."""
        return sum(
            request.num_return_sequences
            * (len(request.prompt_token_ids) + request.max_tokens + self._num_steps_ahead + 1)
            for handle, request in self.requests.items()
            if not self.is_ended(handle)
        )

    def _check_end(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.num_requests_running, stats.num_requests_waiting, stats.num_pages_held) == (0, 0, 0)
        for handle in self.requests:
            self._check_answer(handle)

    def _check_answer(self, handle: int) -> None:
        request, events = self.requests[handle], self.events[handle]
        if isinstance(events[0], RequestFailed):
            assert len(events) == 1, "a failure is the only answer"
            assert events[0].kind.value == ("cancelled" if handle in self.aborted else "deadline")
            return
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        assert tokens == events
        assert [event.is_request_end for event in tokens] == [False] * (len(tokens) - 1) + [True]
        for index in range(request.num_return_sequences):
            self._check_sequence(request, index, [event for event in tokens if event.sequence_index == index])

    def _check_sequence(self, request: GenerationRequest, index: int, events: list[TokenEvent]) -> None:
        finish = events[-1].finish
        assert finish is not None
        assert all(event.finish is None for event in events[:-1]), "a sequence ends once, with its last event"
        expected = expected_outputs(request, index)
        is_scored = request.max_tokens == 0 and finish.reason is FinishReason.LENGTH
        echo = request.prompt_token_ids if request.echo and (finish.num_output_tokens or is_scored) else ()
        ids = tuple(token_id for event in events for token_id in event.token_ids)
        assert ids[: len(echo)] == echo
        outputs = ids[len(echo) :]
        assert len(outputs) == finish.num_output_tokens <= request.max_tokens
        assert outputs == expected.token_ids[: len(outputs)], "the ids of this sequence, in their order"
        if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (outputs, finish.reason, finish.stop_reason) == (
                *(expected.token_ids, expected.reason, expected.stop_reason),
            )
        else:
            assert len(outputs) < len(expected.token_ids) or request.max_tokens == 0
            assert finish.stop_reason == ""
            is_aborted = request.handle in self.aborted
            assert finish.reason is (FinishReason.CANCELLED if is_aborted else FinishReason.DEADLINE)
        self._check_text(request, events, outputs, echo)
        assert finish.num_input_tokens == len(request.prompt_token_ids)
        times = (
            finish.arrival_time_ns,
            finish.first_scheduled_time_ns,
            finish.first_token_time_ns,
            finish.last_token_time_ns,
        )
        assert times[0] == self.arrivals_ns[request.handle]
        assert (times == tuple(sorted(times)) and times[1] > 0) if outputs else times[2] == 0

        given = [log_prob for event in events for log_prob in event.log_probs]
        assert given == [log_prob for log_prob in expected.log_probs[: len(outputs)] if log_prob is not None]
        self._check_prompt(request, index, finish)

    def _check_prompt(self, request: GenerationRequest, index: int, finish: Finish) -> None:
        scores = expected_prompt_log_probs(request) if index == 0 else ()
        is_cut = finish.reason in (FinishReason.CANCELLED, FinishReason.DEADLINE)
        assert finish.prompt_log_probs == (scores[: len(finish.prompt_log_probs)] if is_cut else scores)
        assert finish.num_cached_tokens % PAGE_TOKENS == 0
        assert 0 <= finish.num_cached_tokens < len(request.prompt_token_ids), "the last token is always run"
        may_read = self.scheduler.limits.has_prefix_cache and request.num_prompt_logprobs is None
        assert may_read or index or finish.num_cached_tokens == 0

    @staticmethod
    def _check_text(
        request: GenerationRequest, events: list[TokenEvent], outputs: tuple[int, ...], echo: tuple[int, ...]
    ) -> None:
        marked = [Output(token_id, number >= request.min_tokens) for number, token_id in enumerate(outputs, start=1)]
        whole = allowed_text(TOKEN_BYTES, marked, request.stop_strings, echo, is_finished=True).text
        assert "".join(decode_cut(TOKEN_BYTES, *event.text) for event in events) == whole
        for event in events:
            assert event.is_closed == (bool(event.token_ids) and not TOKEN_BYTES[event.token_ids[-1]])
