"""A device that computes nothing but remembers everything, so that a wrong plan cannot go unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

from backend.engine.plan import PAGE_TOKENS, PlanRow, SlotStart, StepPlan, StepResult

EOS_ID = 1
TOKEN_BYTES: tuple[bytes, ...] = (
    *(b"", b"", b"a", b"b", b"ab", b"ba", b" ", b"."),
    *("é".encode(), "中".encode(), b"\xe4", b"\xb8\xad", b"\xb8", b"\xad", b"\xff"),
)
VOCAB_SIZE = len(TOKEN_BYTES)


def draw(seed: int, position: int, *, forbidden: Collection[int] = ()) -> int:
    """The id behind `position`: a function of seed and position, as the sampler's noise is."""
    token_id = int.from_bytes(hashlib.blake2b(f"{seed} {position}".encode(), digest_size=4).digest()) % VOCAB_SIZE
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


@dataclass
class Slot:
    """What a device knows of the sequence in a slot; `key` is its seed, different for every sequence of a trace."""

    key: int
    start: SlotStart
    token_ids: list[int] = field(default_factory=list)
    num_draws: int = 0


class Device:
    """Runs plans in the order they are launched and asserts what every plan promises to a runner."""

    def __init__(self, num_pages: int, max_num_seqs: int) -> None:
        self.num_pages = num_pages
        self.max_num_seqs = max_num_seqs
        self.slots: dict[int, Slot] = {}
        self.started: list[int] = []
        self._memory: dict[tuple[int, int], tuple[int, int]] = {}

    def launch(self, plan: StepPlan) -> StepResult:
        """Run the rows; the ids of those that sample."""
        drawn = [self._run(row) for row in plan.rows]
        return StepResult(tuple(token_id for token_id in drawn if token_id is not None))

    def _run(self, row: PlanRow) -> int | None:
        assert 0 <= row.slot < self.max_num_seqs
        assert all(0 <= page_id < self.num_pages for page_id in row.page_ids)
        assert (row.slot_start is not None) == (row.start == 0), "parameters come with the first row, once"
        if row.slot_start is not None:
            self.slots[row.slot] = Slot(row.slot_start.sampling.seed, row.slot_start)
            self.started.append(row.slot_start.sampling.seed)
        slot = self.slots[row.slot]
        prompt = slot.start.prompt_token_ids
        num_before = min(len(slot.token_ids), len(prompt)) if row.token_ids else len(slot.token_ids) - 1
        assert row.start == num_before, "every position runs exactly once, in order"
        if row.token_ids:
            assert row.token_ids == prompt[row.start : row.start + row.num_tokens]
            assert row.is_sampled == (row.start + row.num_tokens == len(prompt)), "the last prompt token samples"
            slot.token_ids += row.token_ids
        else:
            assert (row.num_tokens, row.is_sampled) == (1, True)
        self._write_and_attend(row, slot)
        if not row.is_sampled:
            return None
        is_early = slot.num_draws < slot.start.min_tokens
        slot.num_draws += 1
        position = row.start + row.num_tokens - 1
        slot.token_ids.append(draw(slot.key, position, forbidden=slot.start.ending_ids if is_early else ()))
        return slot.token_ids[-1]

    def _write_and_attend(self, row: PlanRow, slot: Slot) -> None:
        end = row.start + row.num_tokens
        assert len(row.page_ids) * PAGE_TOKENS >= end, "the page table covers every position that runs"
        for position in range(row.start, end):
            self._memory[self._place(row, position)] = (slot.key, position)
        for position in range(end):
            assert self._memory[self._place(row, position)] == (slot.key, position), "another sequence wrote here"

    @staticmethod
    def _place(row: PlanRow, position: int) -> tuple[int, int]:
        return row.page_ids[position // PAGE_TOKENS], position % PAGE_TOKENS
