"""Decides which tokens of which sequence run in a step, and what their results mean. No torch, no Triton.

A step is planned before the result of the one before is known. So a sequence may turn out to have ended while its next
token is already in flight: `commit` drops that token, and slot and pages are given back only when nothing is in flight.

Sequences have a fixed rank: arrival, moved by priority. Memory and budget are given out in that order, and a sequence may push
pages of lower-ranked ones out to the host (kv_memory.py), never the other way round.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from itertools import repeat

from backend.engine.events import EngineStats, Event, FailureKind, FinishReason, RequestFailed, TokenEvent
from backend.engine.kv_memory import KvMemory
from backend.engine.plan import PAGE_TOKENS, PlanRow, StepPlan, StepResult, TokenLogProbs
from backend.engine.request import GenerationRequest, num_pages_for
from backend.engine.sequence import Guide, Mask, Phase, RequestGroup, Sequence, rank_of
from backend.engine.steady import LateRow, SteadySequences, in_planned_order
from backend.engine.text_stream import TokenTexts
from backend.engine.waiting_queue import WaitingQueue
from backend.errors import RequestError

_NEVER_NS = 2**63 - 1
_NO_BOUND = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step, of memory, of the queue and of what a stream may be ahead of its client.

    0 means none for `default_deadline_ms`, `max_queued_tokens` and `max_unsent_tokens`.
    `steady_from`: so many sequences must run before columns of them (steady.py) cost less than looking at each.
    `caches_outputs`: pages with generated tokens are found by prompts too; the runner's `caches_outputs` says where that may be.
    """

    num_pages: int
    max_num_seqs: int
    max_step_tokens: int
    max_queued_requests: int
    default_deadline_ms: int = 0
    num_host_pages: int = 0
    max_queued_tokens: int = 0
    has_prefix_cache: bool = True
    max_unsent_tokens: int = 0
    caches_outputs: bool = True
    steady_from: int = 64


class Scheduler:
    """Owns sequences, slots and pages. Called by the engine loop alone, but for `is_listed`."""

    def __init__(self, limits: SchedulerLimits, token_bytes: Ids[bytes], eos_id: int) -> None:
        assert limits.max_num_seqs <= limits.max_step_tokens, "every running sequence must fit into one step"
        self.limits = limits
        self._texts = TokenTexts(token_bytes)
        self._eos_id = eos_id
        self._memory = KvMemory(limits.num_pages, limits.num_host_pages)
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._waiting = WaitingQueue(limits.max_queued_requests, limits.max_queued_tokens)
        self._running: list[Sequence] = []
        self._steady = SteadySequences(limits.max_num_seqs, self._texts.lengths_alone)
        self._watched: list[Sequence] = []  # those of `_running` that are not steady; both in the order of ranks
        # A page for each sequence that decodes, and of a prompt those that its tokens fill and touch.
        self._most_pages_a_step = limits.max_step_tokens // PAGE_TOKENS + 2 * limits.max_num_seqs
        self._by_slot: dict[int, Sequence] = {}
        self._groups: dict[int, RequestGroup] = {}
        self._next_deadline_ns = _NEVER_NS
        self._num_running_requests = 0
        self._failures: list[Event] = []
        self._num_accepted = 0
        self._num_planned_tokens = 0
        self._num_preempted = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits for a step, runs or has a step in flight; not one that still waits for its grammar."""
        return bool(self._waiting or self._running)

    def is_listed(self, handle: int) -> bool:
        """Whether a request was accepted and has not ended; any thread may ask."""
        return handle in self._groups

    def next_deadline_s(self, now_ns: int) -> float | None:
        """Seconds until a deadline may have passed, at least 0; None when no request has one."""
        return None if self._next_deadline_ns == _NEVER_NS else max(0.0, (self._next_deadline_ns - now_ns) / 1e9)

    def add(self, request: GenerationRequest, now_ns: int, guide: Guide | None = None) -> None:
        """Queue a validated request; QueueFull when the queue is at `max_queued_requests` or `max_queued_tokens`.

        `guide`: the compiled grammar that every sequence of the request must follow. A request that has one and comes without is
        counted and can be taken back like any other, but does not run before `give_guide`.
        """
        self._waiting.check_room(request)
        deadline_ms = request.deadline_ms or self.limits.default_deadline_ms
        is_bounded = request.stream and self.limits.max_unsent_tokens
        group = RequestGroup(
            request,
            self._texts,
            self._eos_id,
            PAGE_TOKENS,
            now_ns,
            now_ns + deadline_ms * 1_000_000 if deadline_ms else _NEVER_NS,
            self._num_accepted,
            has_prefix_cache=self.limits.has_prefix_cache,
            most_unsent=self.limits.max_unsent_tokens * request.num_return_sequences if is_bounded else _NO_BOUND,
        )
        if guide is not None:
            group.start_guide(guide)
        self._num_accepted += 1
        self._groups[request.handle] = group
        self._next_deadline_ns = min(self._next_deadline_ns, group.deadline_ns)
        self._waiting.count_in(group)
        if group.is_ready:
            self._waiting.add(group)

    def give_guide(self, handle: int, guide: Guide) -> list[Event]:
        """Let a request go on whose grammar is compiled; nothing happens when it was taken back meanwhile."""
        group = self._groups.get(handle)
        if group is None:
            return []
        try:
            group.start_guide(guide)
        except RequestError as error:  # it cannot be started once more
            return [self._fail(group, FailureKind.INVALID, str(error))]
        self._waiting.add(group)
        return []

    def fail(self, handle: int, kind: FailureKind, message: str) -> list[Event]:
        """End a request with an error; nothing happens when it was taken back meanwhile."""
        group = self._groups.get(handle)
        return [] if group is None else [self._fail(group, kind, message)]

    def note_sent(self, counts: Mapping[int, int]) -> None:
        """Take over how many generated ids of which requests have been sent; those that have ended do not matter."""
        for handle, count in counts.items():
            group = self._groups.get(handle)
            if group is not None:
                group.num_unsent -= count

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
        """The next step, or None when nothing can run: decodes first, then prefill chunks.

        A stream far ahead of its client pauses, with everything it has, until `note_sent`. Unless pages are ample they are
        given out in the order of ranks: a sequence only takes pages of those behind it, which have no row in this step yet.
        """
        is_steadiness_worth_it = len(self._running) >= self.limits.steady_from
        for sequence in self._steady.take_due():
            if not (is_steadiness_worth_it and self._turn_page(sequence)):
                self._leave(sequence)
        self._admit_waiting(now_ns)
        decodes, prefills, joined = list[PlanRow](), list[PlanRow](), list[Sequence]()
        budget = self.limits.max_step_tokens - len(self._steady) - sum([each.can_decode for each in self._watched])
        # NOTE: who loses pages in this loop ranks behind the sequence that takes them, and is inserted there if it was steady.
        for sequence in self._watched:
            if sequence.can_decode:
                if sequence.guide is not None:
                    known_ids = sequence.known_ids(1 + budget)
                    if self._make_ready(sequence, sequence.num_planned_tokens + (len(known_ids) or 1)):
                        decodes.append(sequence.guided_row(known_ids))
                        budget -= decodes[-1].num_forced
                elif sequence.num_planned_tokens < sequence.table.num_ready_tokens or self._make_ready(
                    sequence, sequence.num_planned_tokens + 1
                ):
                    if is_steadiness_worth_it and self._steady.join(sequence):
                        joined.append(sequence)
                    else:
                        decodes.append(sequence.decode_row())
            elif sequence.phase is Phase.PREFILL and budget:
                end = min(sequence.num_planned_tokens + budget, sequence.num_prompt_tokens)
                if self._make_ready(sequence, end):
                    prefills.append(sequence.prefill_row(end))
                    budget -= prefills[-1].num_tokens
        for sequence in joined:
            del self._watched[bisect_left(self._watched, sequence.rank, key=rank_of)]
        if not decodes and not prefills and not self._steady:
            return None
        plan = StepPlan(
            self._steady.num_planned, (*decodes, *prefills), self._memory.take_copies(), self._steady.plan()
        )
        self._num_planned_tokens += plan.num_tokens
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_ns: int) -> list[Event]:
        """Take over the ids of a finished step."""
        events, self._failures = self._failures, []
        late = self._commit_steady(plan, result, now_ns, events)
        rows, num_steady = plan.single_rows, len(plan.steady)
        drawn, log_probs = iter(result.token_ids[num_steady:]), iter(result.log_probs[num_steady:] or repeat(None))
        if late:
            rows, drawn, log_probs = in_planned_order(late, rows, drawn, log_probs, self._by_slot)
        prompt_log_probs = iter(result.prompt_log_probs)
        by_slot, finished, lengths_alone = self._by_slot, Phase.FINISHED, self._texts.lengths_alone
        for row in rows:
            sequence = by_slot[row.slot]
            sequence.num_in_flight -= 1
            num_tokens = row.num_tokens
            end = row.start + num_tokens
            if row.token_ids:
                if row.num_prompt_logprobs is not None:
                    sequence.prompt_log_probs += next(prompt_log_probs)
                if row.start < sequence.num_prompt_tokens <= end and sequence.index == 0:
                    self._waiting.add_siblings(sequence.group)
            if row.is_sampled:
                token_id, log_prob = next(drawn), next(log_probs)
                if sequence.guide is not None:
                    events += self._append_guided(sequence, row, token_id, log_prob, now_ns)
                elif sequence.phase is not finished:
                    if not lengths_alone[token_id] and sequence in self._steady:  # it was drawn before it was steady
                        self._leave(sequence)
                    events.append(self._append(sequence, token_id, log_prob, now_ns))
            elif end == sequence.num_prompt_tokens and sequence.phase is not finished:  # it was only to be scored
                events.append(sequence.finish_score(now_ns))
                self._forget_if_finished(sequence.group)
            if end % PAGE_TOKENS < num_tokens and sequence.kv.may_write_cache:
                self._name_full_pages(sequence, end)
            if sequence.phase is finished and sequence.is_releasable:
                self._release(sequence)
        assert next(drawn, None) is None, "more ids than sampled rows"
        return events

    def _commit_steady(self, plan: StepPlan, result: StepResult, now_ns: int, events: list[Event]) -> list[LateRow]:
        """Take over the ids of steady rows; those that must be looked at one by one come back, and are not steady any more."""
        committed = self._steady.commit(plan.step, plan.steady, result.token_ids[: len(plan.steady)], now_ns)
        for sequence in committed.left:
            insort(self._watched, sequence, key=rank_of)
        if committed.plain is not None:
            events.append(committed.plain)
        for sequence, end in committed.full:
            if sequence.kv.may_write_cache:
                self._steady.catch_up(sequence)
                self._name_full_pages(sequence, end)
        return committed.late

    def _turn_page(self, sequence: Sequence) -> bool:
        """Give a steady sequence that is due its next page at once if there are more than a step can want; False: it leaves."""
        are_ample = self._memory.pool.num_available >= self._most_pages_a_step and not self._memory.has_swapped
        if not are_ample or not self._steady.needs_page(sequence):
            return False
        is_ready = self._memory.prepare(sequence.kv, self._steady.position(sequence) + 1, ())
        assert is_ready, "pages are ample"
        self._steady.turn_page(sequence)
        return True

    def _leave(self, sequence: Sequence) -> None:
        """Let every step look at a sequence that was steady."""
        self._steady.leave(sequence)
        insort(self._watched, sequence, key=rank_of)

    def masks(self, plan: StepPlan) -> dict[int, Mask]:
        """What the guided rows of a launched step may draw, by slot. Called once, after the step before was committed.

        A grammar may prove too complex only here: its request fails alone, and `commit` of the step says so.
        """
        masks = {}
        for row in plan.single_rows:
            sequence = self._by_slot[row.slot]
            if row.is_guided and row.is_sampled and sequence.phase is not Phase.FINISHED:
                assert sequence.guide is not None
                try:
                    for token_id in row.forced_ids:
                        sequence.guide.accept(token_id)
                    masks[row.slot] = sequence.guide.mask()
                except RequestError as error:
                    self._failures.append(self._fail(sequence.group, FailureKind.INVALID, str(error)))
        return masks

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        return EngineStats(
            num_requests_running=self._num_running_requests,
            num_requests_waiting=self._waiting.num_requests,
            num_pages=self.limits.num_pages,
            num_pages_held=self._memory.pool.num_referenced,
            num_pages_cached=self._memory.pool.num_cached,
            num_steps=self._steady.num_planned,
            num_planned_tokens=self._num_planned_tokens,
            num_prefix_queried_tokens=self._memory.prefixes.num_queried_tokens,
            num_prefix_hit_tokens=self._memory.prefixes.num_hit_tokens,
            num_preempted_sequences=self._num_preempted,
            num_swapped_pages=self._memory.num_swapped_out_pages,
        )

    def check_integrity(self) -> None:
        """Assert that pages, slots and requests add up."""
        self._memory.check_integrity([sequence.kv for sequence in self._running])
        assert len(self._free_slots) + len(self._running) == self.limits.max_num_seqs, "a slot was lost"
        assert self._running == sorted(self._running, key=rank_of), "running sequences are out of order"
        assert len(self._watched) + len(self._steady) == len(self._running), "a sequence is neither watched nor steady"
        assert all(group.num_unfinished > 0 for group in self._groups.values()), "a finished request is still listed"
        num_running = len({sequence.request.handle for sequence in self._running})
        assert num_running == self._num_running_requests, "running requests were miscounted"
        self._waiting.check_integrity(list(self._groups.values()))
        if not self.has_work:
            lost = [group for group in self._groups.values() if group.is_ready]
            assert not lost, f"{len(lost)} requests are listed but nothing runs or waits"

    def _make_ready(self, sequence: Sequence, num_tokens: int) -> bool:
        """Bring a sequence's pages for its first `num_tokens` tokens onto the device; who loses some is not steady then."""
        if num_tokens <= sequence.kv.table.num_ready_tokens or self._memory.prepare(sequence.kv, num_tokens, ()):
            return True
        lower = self._running[bisect_right(self._running, sequence.rank, key=rank_of) :]
        num_swapped = [other.kv.table.num_swapped for other in lower]
        is_ready = self._memory.prepare(sequence.kv, num_tokens, [other.kv for other in lower])
        self._num_preempted += sum(
            not before and other.kv.table.num_swapped > 0 for before, other in zip(num_swapped, lower, strict=True)
        )
        for other in lower:
            if other.kv.table.num_swapped and other in self._steady:
                self._leave(other)
        return is_ready

    def _admit_waiting(self, now_ns: int) -> None:
        """Admit in the order of ranks, as long as the step is not full with what runs already."""
        if not self._waiting or not self._can_admit(self._waiting.first):
            return
        num_tokens = len(self._steady) + sum([each.num_wanted_tokens for each in self._watched])
        while self._waiting and num_tokens < self.limits.max_step_tokens and self._can_admit(self._waiting.first):
            sequence = self._waiting.pop_first()
            self._admit(sequence, now_ns)
            num_tokens += sequence.num_wanted_tokens

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether there is a slot, a promise, and memory: room for the prompt, or sequences behind it to push out.

        Nobody is admitted past a sequence that lost pages to another.
        """
        if not self._free_slots or not self._memory.can_promise(sequence.kv.num_pages_promised):
            return False
        if self._memory.has_swapped and any(
            other.table.num_swapped for other in self._running if other.rank < sequence.rank
        ):
            return False
        has_room = num_pages_for(sequence.num_prompt_tokens, PAGE_TOKENS) <= self._memory.pool.num_available
        return has_room or not self._running or sequence.rank < self._running[-1].rank

    def _admit(self, sequence: Sequence, now_ns: int) -> None:
        """Give a sequence a slot and what the prefix cache has of its prompt."""
        sequence.slot = self._free_slots.pop()
        self._by_slot[sequence.slot] = sequence
        sequence.num_cached_tokens = self._memory.admit(sequence.kv, sequence.request.prompt_token_ids)
        sequence.num_planned_tokens = sequence.num_cached_tokens
        sequence.phase = Phase.PREFILL
        sequence.first_scheduled_time_ns = now_ns
        insort(self._running, sequence, key=rank_of)
        insort(self._watched, sequence, key=rank_of)
        self._num_running_requests += sequence.group.num_running == 0
        sequence.group.num_running += 1

    def _name_full_pages(self, sequence: Sequence, num_tokens: int) -> None:
        """Let prompts find the pages whose KV is known to be there, up to `num_tokens` or the end of what may be found."""
        end = num_tokens if self.limits.caches_outputs else min(num_tokens, sequence.num_prompt_tokens)
        self._memory.name_full_pages(sequence.kv, sequence.token_ids(sequence.kv.num_named_tokens, end))

    def _append(self, sequence: Sequence, token_id: int, log_prob: TokenLogProbs | None, now_ns: int) -> TokenEvent:
        event = sequence.append(token_id, log_prob, now_ns)
        if event.finish is not None:
            self._forget_if_finished(sequence.group)
        return event

    def _append_guided(
        self, sequence: Sequence, row: PlanRow, token_id: int, log_prob: TokenLogProbs | None, now_ns: int
    ) -> list[Event]:
        """Take over what a grammar forced and the id drawn behind that, as far as the sequence has not ended."""
        events: list[Event] = []
        for forced_id in row.forced_ids:
            if sequence.phase is not Phase.FINISHED:
                events.append(self._append(sequence, forced_id, None, now_ns))
        if sequence.phase is Phase.FINISHED:
            return events
        assert sequence.guide is not None
        try:
            sequence.guide.accept(token_id)
        except RequestError as error:
            return [*events, self._fail(sequence.group, FailureKind.INVALID, str(error))]
        return [*events, self._append(sequence, token_id, log_prob, now_ns)]

    def _end(self, group: RequestGroup, reason: FinishReason, kind: FailureKind, message: str) -> list[Event]:
        """End what is unfinished of a request: an error when it has no token yet, a finish reason afterwards."""
        events = self._end_sequences(group, reason)
        return events if group.has_tokens else [RequestFailed(group.request.handle, kind, message)]

    def _fail(self, group: RequestGroup, kind: FailureKind, message: str) -> RequestFailed:
        """End a request that cannot go on, such as by its grammar; tokens it has been sent stay valid."""
        self._end_sequences(group, FinishReason.CANCELLED)
        return RequestFailed(group.request.handle, kind, message)

    def _end_sequences(self, group: RequestGroup, reason: FinishReason) -> list[Event]:
        events: list[Event] = []
        for sequence in group.sequences:
            if sequence.phase is Phase.FINISHED:
                continue
            if sequence in self._steady:
                self._leave(sequence)
            if sequence.phase is Phase.WAITING:
                self._waiting.remove(sequence)
            events.append(sequence.end(reason))
            if sequence.is_releasable:
                self._release(sequence)
        self._forget_if_finished(group)
        return events

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._watched.remove(sequence)
        del self._by_slot[sequence.slot]
        self._memory.release(sequence.kv)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.group.num_running -= 1
        self._num_running_requests -= sequence.group.num_running == 0
        sequence.group.let_go()

    def _forget_if_finished(self, group: RequestGroup) -> None:
        if group.num_unfinished == 0:
            del self._groups[group.request.handle]
            group.let_go()
