"""A device that computes nothing but remembers every token in every page, so that a wrong plan cannot go unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from backend.engine.plan import PAGE_TOKENS, PageCopy, PlanRow, SlotStart, StepPlan, StepResult, TokenLogProbs
from backend.runner.model_runner import Mask

EOS_ID = 1
TOKEN_BYTES: tuple[bytes, ...] = (
    *(b"", b"", b"a", b"b", b"ab", b"ba", b" ", b"."),
    *("é".encode(), "中".encode(), b"\xe4", b"\xb8\xad", b"\xb8", b"\xad", b"\xff"),
)
VOCAB_SIZE = len(TOKEN_BYTES)
_UNWRITTEN = 255


def draw_id(token_ids: Sequence[int], seed: int, allowed: Collection[int]) -> int:
    """The id behind `token_ids`: a function of all of them and the seed, as a model and its sampler are."""
    digest = hashlib.blake2b(bytes(token_ids) + seed.to_bytes(8, "little"), digest_size=4).digest()
    token_id = int.from_bytes(digest, "little") % VOCAB_SIZE
    assert allowed, "some id is always allowed"
    while token_id not in allowed:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def log_probs_of(token_ids: Sequence[int], next_id: int, num_top: int) -> TokenLogProbs:
    """Made-up log-probabilities of `next_id` behind `token_ids`."""
    digest = hashlib.blake2b(bytes(token_ids), digest_size=2).digest()
    top_log_probs = tuple(-float(number) - digest[0] for number in range(num_top))
    return TokenLogProbs(-float(digest[0] * next_id), 1 + digest[1], tuple(range(num_top)), top_log_probs)


def allowed_ids(mask: Mask | None) -> set[int]:
    """The ids of a mask; all of them without one."""
    if mask is None:
        return set(range(VOCAB_SIZE))
    return {token_id for token_id in range(VOCAB_SIZE) if int(mask[token_id >> 5]) >> (token_id & 31) & 1}


@dataclass
class Slot:
    """What a device knows of the sequence in a slot: its ids, run or drawn, and how many were run."""

    start: SlotStart
    num_run: int
    token_ids: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = bytearray(self.start.prompt_token_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.start.prompt_token_ids)


class DeviceStep:
    """A step whose forward pass ran when it was launched; `draw` appends the drawn ids to their slots."""

    def __init__(self, plan: StepPlan, slots: list[Slot], prompt_log_probs: tuple[tuple[TokenLogProbs, ...], ...]):
        self._plan, self._slots, self._prompt_log_probs = plan, slots, prompt_log_probs
        self._result: StepResult | None = None

    def draw(self, masks: Mapping[int, Mask]) -> None:
        assert self._result is None, "a step is drawn once"
        sampled = [(row, slot) for row, slot in zip(self._plan.rows, self._slots, strict=True) if row.is_sampled]
        assert set(masks) <= {row.slot for row, _ in sampled if row.is_guided}, "masks are for guided draws alone"
        ids, log_probs = [], []
        for row, slot in sampled:
            end, start = row.start + row.num_tokens, slot.start
            is_early = end - len(start.prompt_token_ids) < start.min_tokens
            allowed = allowed_ids(masks.get(row.slot)) - set(start.ending_ids if is_early else ())
            assert len(slot.token_ids) == end, "an id is drawn behind the last one"
            ids.append(draw_id(slot.token_ids, start.sampling.seed, allowed))
            wanted = start.num_logprobs
            log_probs.append(None if wanted is None else log_probs_of(slot.token_ids, ids[-1], wanted))
            slot.token_ids.append(ids[-1])
        self._result = StepResult(tuple(ids), tuple(log_probs) if any(log_probs) else (), self._prompt_log_probs)

    def result(self) -> StepResult:
        assert self._result is not None, "the ids are drawn before the result is asked for"
        return self._result


class Device:
    """Runs copies and rows in the order they are launched and asserts what every plan promises to a runner."""

    def __init__(self, num_pages: int, max_num_seqs: int, num_host_pages: int = 0) -> None:
        self.num_pages, self.num_host_pages, self.max_num_seqs = num_pages, num_host_pages, max_num_seqs
        self.slots: dict[int, Slot] = {}
        self.num_run_tokens = 0
        self._pages = [bytes([_UNWRITTEN]) * PAGE_TOKENS for _ in range(num_pages)]
        self._host_pages = [bytes([_UNWRITTEN]) * PAGE_TOKENS for _ in range(num_host_pages)]

    def launch(self, plan: StepPlan) -> DeviceStep:
        for copy in plan.copies:
            self._copy(copy)
        self._check_nobody_writes_what_others_use(plan)
        for row in plan.rows:
            self._run(row)
        scores = tuple(self._prompt_log_probs(row) for row in plan.rows if row.num_prompt_logprobs is not None)
        return DeviceStep(plan, [self.slots[row.slot] for row in plan.rows], scores)

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing to free."""

    def _copy(self, copy: PageCopy) -> None:
        source, target = (self._pages, self._host_pages) if copy.is_to_host else (self._host_pages, self._pages)
        assert 0 <= copy.source < len(source)
        assert 0 <= copy.target < len(target)
        target[copy.target] = source[copy.source]

    @staticmethod
    def _check_nobody_writes_what_others_use(plan: StepPlan) -> None:
        for writer in plan.rows:
            first, last = writer.start // PAGE_TOKENS, (writer.start + writer.num_tokens - 1) // PAGE_TOKENS
            written = set(writer.page_ids[first : last + 1])
            for row in plan.rows:
                assert row is writer or not written & set(row.page_ids), "a page is written that another row uses"

    def _run(self, row: PlanRow) -> None:
        assert 0 <= row.slot < self.max_num_seqs
        if row.slot_start is not None:
            assert row.start % PAGE_TOKENS == 0, "a sequence begins where a shared page ends"
            self.slots[row.slot] = Slot(row.slot_start, row.start)
        slot = self.slots[row.slot]
        prompt, end = slot.start.prompt_token_ids, row.start + row.num_tokens
        assert row.start == slot.num_run, "every position runs exactly once, in order"
        assert len(row.token_ids) in (0, row.num_tokens)
        if row.start < len(prompt):
            assert row.num_forced == 0
            assert row.token_ids == prompt[row.start : end]
            assert end == len(prompt) or not row.is_sampled, "only the last prompt token draws"
        else:
            assert row.is_sampled, "every decode draws"
            assert row.start == len(slot.token_ids) - 1, "a decode runs the id drawn last"
            assert row.num_tokens == 1 + row.num_forced
            assert not row.token_ids or row.token_ids[0] == slot.token_ids[-1], (
                "the first known id is the one drawn last"
            )
            slot.token_ids += bytes(row.token_ids[1:])
        self._write_and_attend(row, slot, end)
        slot.num_run = end
        self.num_run_tokens += row.num_tokens

    def _write_and_attend(self, row: PlanRow, slot: Slot, end: int) -> None:
        assert len(row.page_ids) * PAGE_TOKENS >= end, "the page table covers every position that runs"
        assert all(0 <= page_id < self.num_pages for page_id in row.page_ids)
        assert len(set(row.page_ids)) == len(row.page_ids), "a page has one place in a sequence"
        for position in range(row.start, end):
            page_id, offset = row.page_ids[position // PAGE_TOKENS], position % PAGE_TOKENS
            page = self._pages[page_id]
            self._pages[page_id] = page[:offset] + slot.token_ids[position : position + 1] + page[offset + 1 :]
        seen = b"".join(self._pages[page_id] for page_id in row.page_ids)[:end]
        assert seen == slot.token_ids[:end], "the pages hold something else than this sequence"

    def _prompt_log_probs(self, row: PlanRow) -> tuple[TokenLogProbs, ...]:
        assert row.num_prompt_logprobs is not None
        prompt = self.slots[row.slot].start.prompt_token_ids
        ends = range(row.start + 1, min(row.start + row.num_tokens, len(prompt) - 1) + 1)
        return tuple(log_probs_of(prompt[:end], prompt[end], row.num_prompt_logprobs) for end in ends)
