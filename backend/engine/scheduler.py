"""Decides which tokens of which sequence run in a step, and what their results mean. Pure Python: no torch, no Triton.

A step is planned before the result of the one before is known. So a sequence may turn out to have ended while its next
token is already in flight: `commit` drops that token, and slot and pages are given back only when nothing is in flight.

Admission reserves the pages of a whole generation, so a running sequence never waits for memory and never has to give way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from backend.engine.events import EngineStats, FailureKind, Finish, FinishReason, RequestFailed, TokenEvent
from backend.engine.page_pool import PagePool
from backend.engine.plan import PAGE_TOKENS, PlanRow, StepPlan, StepResult
from backend.engine.request import GenerationRequest
from backend.engine.sequence import Phase, RequestGroup, Sequence
from backend.engine.text_stream import TextCut
from backend.errors import QueueFull

_NEVER_NS = 2**63 - 1
Event = TokenEvent | RequestFailed


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue; `default_deadline_ms` 0 means none."""

    num_pages: int
    max_num_seqs: int
    max_step_tokens: int
    max_queued_requests: int
    default_deadline_ms: int = 0


class Scheduler:
    """Owns sequences, slots and pages. `add`, `abort`, `plan` and `commit` are called by the engine loop alone."""

    def __init__(self, limits: SchedulerLimits, token_bytes: Ids[bytes], eos_id: int) -> None:
        assert limits.max_num_seqs <= limits.max_step_tokens, "every running sequence must fit into one step"
        self.limits = limits
        self._token_bytes = token_bytes
        self._eos_id = eos_id
        self._pool = PagePool(limits.num_pages)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._num_waiting_requests = 0
        self._num_running_requests = 0
        self._next_deadline_ns = _NEVER_NS
        self._running: dict[int, Sequence] = {}
        self._groups: dict[int, RequestGroup] = {}
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits, runs or has a step in flight."""
        return bool(self._waiting or self._running)

    def add(self, request: GenerationRequest, now_ns: int) -> None:
        """Queue a validated request; QueueFull when `max_queued_requests` requests wait already."""
        if self._num_waiting_requests >= self.limits.max_queued_requests:
            raise QueueFull(
                f"the queue is full: {self._num_waiting_requests} requests wait, max_queued_requests is "
                f"{self.limits.max_queued_requests}; try again later"
            )
        deadline_ms = request.deadline_ms or self.limits.default_deadline_ms
        deadline_ns = now_ns + deadline_ms * 1_000_000 if deadline_ms else _NEVER_NS
        group = RequestGroup(request, self._token_bytes, self._eos_id, now_ns, deadline_ns)
        self._groups[request.handle] = group
        self._next_deadline_ns = min(self._next_deadline_ns, deadline_ns)
        self._waiting.extend(group.sequences)
        self._num_waiting_requests += 1

    def abort(self, handle: int) -> list[Event]:
        """Take a request back; a handle that is unknown or finished is no error (the two cross on the way)."""
        group = self._groups.get(handle)
        return [] if group is None else self._end(group, FinishReason.CANCELLED, FailureKind.CANCELLED, "cancelled")

    def abort_request_id(self, request_id: str) -> list[Event]:
        """Take back every request that a client named `request_id`."""
        handles = [handle for handle, group in self._groups.items() if group.request.request_id == request_id]
        return [event for handle in handles for event in self.abort(handle)]

    def abort_all(self) -> list[Event]:
        """Take back everything (the end of a drain's grace period)."""
        return [event for handle in list(self._groups) for event in self.abort(handle)]

    def expire(self, now_ns: int) -> list[Event]:
        """End the requests whose deadline has passed."""
        events: list[Event] = []
        if now_ns < self._next_deadline_ns:
            return events
        for group in [group for group in self._groups.values() if group.deadline_ns <= now_ns]:
            deadline_ms = (group.deadline_ns - group.arrival_time_ns) // 1_000_000
            waited_ms = (now_ns - group.arrival_time_ns) // 1_000_000
            message = (
                f"deadline_ms: nothing was generated within {deadline_ms} ms; {waited_ms} ms have passed since arrival"
            )
            events += self._end(group, FinishReason.DEADLINE, FailureKind.DEADLINE, message)
        self._next_deadline_ns = min((group.deadline_ns for group in self._groups.values()), default=_NEVER_NS)
        return events

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next step, or None when nothing can run: decodes first, then running prefills, then new sequences."""
        budget = self.limits.max_step_tokens
        rows: list[PlanRow] = []
        for sequence in self._running.values():
            if sequence.phase is Phase.DECODE and sequence.wants_another_token:
                rows.append(self._decode_row(sequence))
                budget -= 1
        for sequence in self._running.values():
            if sequence.phase is Phase.PREFILL and budget:
                rows.append(self._prefill_row(sequence, budget))
                budget -= rows[-1].num_tokens
        while budget and self._waiting and self._can_admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._admit(sequence, now_ns)
            rows.append(self._prefill_row(sequence, budget))
            budget -= rows[-1].num_tokens
        if not rows:
            return None
        self._num_steps += 1
        return StepPlan(self._num_steps - 1, tuple(rows))

    def commit(self, plan: StepPlan, result: StepResult, now_ns: int) -> list[Event]:
        """Take over the ids of a finished step."""
        events: list[Event] = []
        drawn = iter(result.token_ids)
        for row in plan.rows:
            sequence = self._running[row.slot]
            sequence.num_in_flight -= 1
            if row.is_sampled:
                token_id = next(drawn)
                sequence.num_draws_in_flight -= 1
                if sequence.phase is not Phase.FINISHED:
                    events.append(self._append(sequence, token_id, now_ns))
            if sequence.is_releasable:
                self._release(sequence)
        assert next(drawn, None) is None, "more ids than sampled rows"
        return events

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        return EngineStats(
            num_requests_running=self._num_running_requests,
            num_requests_waiting=self._num_waiting_requests,
            num_pages=self._pool.num_pages,
            num_pages_held=self._pool.num_held,
            num_steps=self._num_steps,
        )

    def check_integrity(self) -> None:
        """Assert that pages, slots and requests add up."""
        held = [page_id for sequence in self._running.values() for page_id in sequence.page_ids]
        assert len(held) == len(set(held)), "a page belongs to two sequences"
        self._pool.check_integrity(len(held))
        assert len(self._free_slots) + len(self._running) == self.limits.max_num_seqs, "a slot was lost"
        num_waiting = len({sequence.request.handle for sequence in self._waiting})
        assert num_waiting == self._num_waiting_requests, "waiting requests were miscounted"
        num_running = len({sequence.request.handle for sequence in self._running.values()})
        assert num_running == self._num_running_requests, "running requests were miscounted"
        assert all(group.num_unfinished > 0 for group in self._groups.values()), "a finished request is still listed"
        if not self.has_work:
            assert not self._groups, f"{len(self._groups)} requests are listed but nothing runs or waits"

    def _decode_row(self, sequence: Sequence) -> PlanRow:
        start = sequence.num_planned_tokens
        self._count_planned(sequence, 1, is_sampled=True)
        return PlanRow(sequence.slot, start, 1, (), sequence.page_ids, is_sampled=True)

    def _prefill_row(self, sequence: Sequence, budget: int) -> PlanRow:
        start = sequence.num_planned_tokens
        end = min(start + budget, sequence.num_prompt_tokens)
        is_last = end == sequence.num_prompt_tokens
        slot_start = sequence.slot_start() if start == 0 else None
        self._count_planned(sequence, end - start, is_sampled=is_last)
        if is_last:
            sequence.phase = Phase.DECODE
        ids = sequence.request.prompt_token_ids[start:end]
        return PlanRow(sequence.slot, start, end - start, ids, sequence.page_ids, is_last, slot_start)

    @staticmethod
    def _count_planned(sequence: Sequence, num_tokens: int, *, is_sampled: bool) -> None:
        sequence.num_planned_tokens += num_tokens
        sequence.num_in_flight += 1
        sequence.num_draws_in_flight += is_sampled

    def _can_admit(self, sequence: Sequence) -> bool:
        return bool(self._free_slots) and sequence.num_pages_needed(PAGE_TOKENS) <= self._pool.num_free

    def _admit(self, sequence: Sequence, now_ns: int) -> None:
        self._count_not_waiting(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.page_ids = self._pool.allocate(sequence.num_pages_needed(PAGE_TOKENS))
        sequence.phase = Phase.PREFILL
        sequence.first_scheduled_time_ns = now_ns
        self._running[sequence.slot] = sequence
        self._num_running_requests += sequence.group.num_running == 0
        sequence.group.num_running += 1

    def _count_not_waiting(self, sequence: Sequence) -> None:
        sequence.group.num_waiting -= 1
        if sequence.group.num_waiting == 0:
            self._num_waiting_requests -= 1

    def _append(self, sequence: Sequence, token_id: int, now_ns: int) -> TokenEvent:
        request = sequence.request
        echoed = self._take_echo(sequence)
        sequence.num_outputs += 1
        sequence.group.has_tokens = True
        sequence.first_token_time_ns = sequence.first_token_time_ns or now_ns
        sequence.last_token_time_ns = now_ns
        may_stop = sequence.num_outputs >= request.min_tokens
        stop = sequence.text.append(token_id, may_stop=may_stop)
        finish = None
        if stop is not None:
            finish = sequence.finish(FinishReason.STOP, stop.decode("utf-8", "replace"))
        elif may_stop and token_id in sequence.group.ending_ids:
            is_end = token_id == sequence.group.end_id and token_id not in request.stop_token_ids
            sequence.text.finish()
            finish = sequence.finish(FinishReason.STOP, "" if is_end else str(token_id))
        elif sequence.num_outputs == request.max_tokens:
            sequence.text.finish()
            finish = sequence.finish(FinishReason.LENGTH)
        if finish is not None:
            self._forget_if_finished(sequence.group)
        is_closed = not self._token_bytes[token_id]
        return self._event(sequence, (*echoed, token_id), sequence.text.take(), is_closed, finish)

    def _take_echo(self, sequence: Sequence) -> tuple[int, ...]:
        if not sequence.is_echo_due:
            return ()
        sequence.is_echo_due = False
        sequence.text.append_echo(sequence.request.prompt_token_ids)
        return sequence.request.prompt_token_ids

    def _end(self, group: RequestGroup, reason: FinishReason, kind: FailureKind, message: str) -> list[Event]:
        """End what is unfinished of a request: an error when it has no token yet, a finish reason afterwards."""
        events: list[Event] = []
        for sequence in group.sequences:
            if sequence.phase is Phase.FINISHED:
                continue
            if sequence.phase is Phase.WAITING:
                self._waiting.remove(sequence)
                self._count_not_waiting(sequence)
            sequence.text.finish()
            finish = sequence.finish(reason)
            if group.has_tokens:
                events.append(self._event(sequence, (), sequence.text.take(), False, finish))
            if sequence.is_releasable:
                self._release(sequence)
        self._forget_if_finished(group)
        return events if group.has_tokens else [RequestFailed(group.request.handle, kind, message)]

    @staticmethod
    def _event(
        sequence: Sequence, ids: tuple[int, ...], text: TextCut, is_closed: bool, finish: Finish | None
    ) -> TokenEvent:
        is_request_end = finish is not None and sequence.group.num_unfinished == 0
        return TokenEvent(sequence.request.handle, sequence.index, ids, *text, is_closed, finish, is_request_end)

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.slot]
        self._pool.free(sequence.page_ids)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.page_ids = -1, ()
        sequence.group.num_running -= 1
        self._num_running_requests -= sequence.group.num_running == 0

    def _forget_if_finished(self, group: RequestGroup) -> None:
        if group.num_unfinished == 0:
            del self._groups[group.request.handle]
