"""Sequences that do the same in every step: one id runs, the next is drawn, its text goes out. Kept as columns.

Hundreds of sequences decode at a time, and looking at each of them in each step is what a step costs the host. Most need no look:
how far they are follows from the step's number. So a sequence that is sure to decode for a while becomes *steady*: its row is a
place in a few arrays, its ids go into a table, and its own fields stand still. When its foreseeable time is over it is due: where
only its page is full, it gets the next one. Else, or when anything happens to it, it leaves, gets its fields back, and is looked
at one by one like any other; then it may come back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from backend.engine.events import PlainTokens
from backend.engine.plan import NO_STEADY_ROWS, PAGE_TOKENS, PlanRow, SteadyRows, TokenLogProbs
from backend.engine.sequence import Sequence

_LEAST_STEPS = 4
"""A sequence that would have to leave sooner is not worth its way in and out."""
_KEPT_STEPS = 2 * PAGE_TOKENS
"""Steps whose ids are kept. Everyone catches up after a page at the latest, and no more steps than that are in flight."""
_NEVER = 2**62
Int32Array = npt.NDArray[np.int32]
LateRow = tuple[PlanRow, int]
"""A row that was planned as a steady one, and the id drawn for it."""


class CommittedRows(NamedTuple):
    """What came of the steady rows of a step.

    `late`: rows whose sequences have left since they were planned, or `left` just now because of their ids; the caller takes them
    over one by one. `full`: sequences here whose page became full with this step, and how many tokens they had then.
    """

    plain: PlainTokens | None
    late: list[LateRow]
    left: list[Sequence]
    full: list[tuple[Sequence, int]]


_NOTHING = CommittedRows(None, [], [], [])


class SteadySequences:
    """Owned by the Scheduler. Steps are planned, and committed, one after the other, and each plan has a row of everyone here.

    A sequence's `num_planned_tokens`, `num_in_flight`, `output_ids` and `last_token_time_ns`, and its group's `num_unsent`, stand
    still while it is here; `leave` brings them up to date, and `catch_up` those that a commit changes but `num_in_flight`.
    """

    def __init__(self, num_slots: int, lengths_alone: bytes) -> None:
        self._lengths_alone = np.frombuffer(lengths_alone, dtype=np.uint8)
        self.num_planned = 0
        """Steps planned so far, and so the number of the next."""
        self._num_committed = 0
        self._due: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by step: slots, and when they joined
        self._ids = np.zeros((_KEPT_STEPS, num_slots), dtype=np.int32)
        self._times_ns = [0] * _KEPT_STEPS
        # In no order, by place.
        self._sequences: list[Sequence] = []
        self._page_ids: list[tuple[int, ...]] = []
        self._slots = np.zeros(num_slots, dtype=np.int32)
        self._offsets = np.zeros(num_slots, dtype=np.int64)  # the position that runs in a step, less the step's number
        self._are_changed = True
        self._planned_slots: Int32Array = self._slots[:0]
        self._planned_page_ids: tuple[tuple[int, ...], ...] = ()
        # By slot. `_since`: all rows of the sequence from this step on are steady ones.
        self._places = np.full(num_slots, -1, dtype=np.int32)
        self._handles = np.zeros(num_slots, dtype=np.uint64)
        self._since = np.full(num_slots, _NEVER, dtype=np.int64)
        self._joined = [0] * num_slots
        self._caught_up = [0] * num_slots  # the first step whose id the sequence's own fields do not have
        self._left = [(-1, 0)] * num_slots  # at which step, and `_since` then

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.slot >= 0 and bool(self._places[sequence.slot] >= 0)

    def take_due(self) -> list[Sequence]:
        """Those that somebody must look at before the next step is planned: each must `leave`, or `turn_page`."""
        return [
            self._sequences[self._places[slot]]
            for slot, joined in self._due.pop(self.num_planned, ())
            if self._places[slot] >= 0 and self._joined[slot] == joined
        ]

    def needs_page(self, sequence: Sequence) -> bool:
        """Whether all that a due sequence lacks is its next page."""
        self.catch_up(sequence)
        is_full = self.position(sequence) == sequence.table.num_ready_tokens
        return is_full and self._num_steps_with_pages(sequence) >= _LEAST_STEPS

    def turn_page(self, sequence: Sequence) -> None:
        """Go on with a due sequence that has the page now that it needed."""
        slot, step, num_steps = sequence.slot, self.num_planned, self._num_steps_with_pages(sequence)
        sequence.num_planned_tokens = self.position(sequence)
        self._joined[slot] = step
        self._page_ids[self._places[slot]] = sequence.table.page_ids
        self._due[step + min(num_steps, PAGE_TOKENS)].append((slot, step))
        self._are_changed = True

    def _num_steps_with_pages(self, sequence: Sequence) -> int:
        """How long a sequence here could go on if it had the pages."""
        num_steady_in_flight = self.num_planned - max(int(self._since[sequence.slot]), self._num_committed)
        return _num_steps(sequence, self.position(sequence), sequence.num_in_flight + num_steady_in_flight)

    def join(self, sequence: Sequence) -> bool:
        """Take in a decoding sequence whose next position has its page, from the next plan on; False when it is not steady."""
        if not sequence.is_plain:
            return False
        start, table = sequence.num_planned_tokens, sequence.table
        num_steps = min(
            _num_steps(sequence, start, sequence.num_in_flight), table.num_ready_tokens - start, PAGE_TOKENS
        )
        if num_steps < _LEAST_STEPS:
            return False
        place, slot, step = len(self._sequences), sequence.slot, self.num_planned
        self._sequences.append(sequence)
        self._page_ids.append(table.page_ids)
        self._slots[place], self._offsets[place] = slot, start - step
        self._places[slot], self._handles[slot], self._joined[slot] = place, sequence.handle, step
        self._due[step + num_steps].append((slot, step))
        # A sequence that left just now, perhaps for a page, has steady rows in flight: they go on as such.
        left, was_since = self._left[slot]
        since = was_since if left == step else step
        first_in_flight = max(since, self._num_committed)
        sequence.num_in_flight -= step - first_in_flight
        self._since[slot], self._caught_up[slot] = since, first_in_flight
        self._are_changed = True
        return True

    def position(self, sequence: Sequence) -> int:
        """Where it runs in the next step."""
        return sequence.num_planned_tokens + self.num_planned - self._joined[sequence.slot]

    def leave(self, sequence: Sequence) -> None:
        """Let a sequence go, with its fields as if it had never been here."""
        self.catch_up(sequence)
        slot = sequence.slot
        since = int(self._since[slot])
        sequence.num_planned_tokens = self.position(sequence)
        sequence.num_in_flight += self.num_planned - max(since, self._num_committed)
        self._left[slot] = self.num_planned, since
        place = int(self._places[slot])
        self._places[slot], self._since[slot] = -1, _NEVER
        last, last_page_ids, end = self._sequences.pop(), self._page_ids.pop(), len(self._sequences)
        if last is not sequence:
            self._sequences[place], self._page_ids[place] = last, last_page_ids
            self._slots[place], self._offsets[place] = self._slots[end], self._offsets[end]
            self._places[last.slot] = place
        self._are_changed = True

    def catch_up(self, sequence: Sequence) -> None:
        """Give a sequence the ids that were committed meanwhile."""
        slot, end = sequence.slot, self._num_committed
        first = self._caught_up[slot]
        if first < end:
            kept, num_kept = first % _KEPT_STEPS, end - first
            sequence.output_ids += self._ids[kept : kept + num_kept, slot].tolist()
            if kept + num_kept > _KEPT_STEPS:
                sequence.output_ids += self._ids[: kept + num_kept - _KEPT_STEPS, slot].tolist()
            sequence.group.num_unsent += end - first
            sequence.last_token_time_ns = self._times_ns[(end - 1) % _KEPT_STEPS]
            self._caught_up[slot] = end

    def plan(self) -> SteadyRows:
        """Their rows in the next step, which is planned herewith."""
        num_rows = len(self._sequences)
        if not num_rows:
            self.num_planned += 1
            return NO_STEADY_ROWS
        if self._are_changed:
            self._planned_slots, self._planned_page_ids = self._slots[:num_rows].copy(), tuple(self._page_ids)
            self._are_changed = False
        starts = (self._offsets[:num_rows] + self.num_planned).astype(np.int32)
        self.num_planned += 1
        return SteadyRows(self._planned_slots, starts, self._planned_page_ids)

    def commit(self, step: int, rows: SteadyRows, token_ids: tuple[int, ...], now_ns: int) -> CommittedRows:
        """Take over the ids of a step's steady rows; of every step in turn, also one without such rows."""
        assert step == self._num_committed, f"step {step} is committed, and not {self._num_committed}"
        if not token_ids:
            self._num_committed += 1
            return _NOTHING
        slots, ids = rows.slots, np.array(token_ids, dtype=np.int32)
        num_bytes = self._lengths_alone[ids]
        are_here = self._since[slots] <= self._num_committed
        are_plain = are_here & (num_bytes > 0)
        late, left = [], []
        if not are_plain.all():
            for index in np.flatnonzero(~are_plain).tolist():
                row = rows.row(index)
                late.append((row, token_ids[index]))
                if are_here[index]:
                    left.append(self._sequences[self._places[row.slot]])
                    self.leave(left[-1])
        kept = self._num_committed % _KEPT_STEPS
        self._ids[kept, slots] = ids
        self._times_ns[kept] = now_ns
        self._num_committed += 1
        full = [
            (self._sequences[self._places[rows.slots[index]]], int(rows.starts[index]) + 1)
            for index in np.flatnonzero(rows.starts % PAGE_TOKENS == PAGE_TOKENS - 1).tolist()
            if are_plain[index]
        ]
        full.sort(key=lambda each: each[0].rank)
        if late:
            slots, ids, num_bytes = slots[are_plain], ids[are_plain], num_bytes[are_plain]
        plain = PlainTokens(self._handles[slots].tolist(), ids.tolist(), num_bytes.tolist()) if len(slots) else None
        return CommittedRows(plain, late, left, full)


def in_planned_order(
    late: list[LateRow],
    rows: tuple[PlanRow, ...],
    drawn: Iterator[int],
    log_probs: Iterator[TokenLogProbs | None],
    by_slot: Mapping[int, Sequence],
) -> tuple[tuple[PlanRow, ...], Iterator[int], Iterator[TokenLogProbs | None]]:
    """Rows, and what was drawn for those that are sampled, with the late ones where they would be had they never been steady.

    That is decodes before prompts, each by rank; so what is given back is given back in the same order.
    """
    taken = [(row, next(drawn), next(log_probs)) if row.is_sampled else (row, None, None) for row in rows]
    taken += [(row, token_id, None) for row, token_id in late]

    def place(each: tuple[PlanRow, int | None, TokenLogProbs | None]) -> tuple[bool, tuple[int, int, int]]:
        sequence = by_slot[each[0].slot]
        return each[0].start < sequence.num_prompt_tokens, sequence.rank

    taken.sort(key=place)
    sampled = [(token_id, log_prob) for _, token_id, log_prob in taken if token_id is not None]
    ids, scores = iter([token_id for token_id, _ in sampled]), iter([log_prob for _, log_prob in sampled])
    return tuple([row for row, _, _ in taken]), ids, scores


def _num_steps(sequence: Sequence, start: int, num_in_flight: int) -> int:
    """How long a plain sequence could be steady from position `start` on, but for pages: until its client is behind, or its end.

    Its last row is planned one by one, so that no id of a steady row is the last.
    """
    group = sequence.group
    return min(sequence.decode_end - 1 - start, group.most_unsent - group.num_unsent - num_in_flight)
