"""Who has which pages when they run out: promises, what is moved first, and that the host always has room for it."""

from __future__ import annotations

from backend.engine.kv_memory import Holder, KvMemory
from backend.engine.plan import PAGE_TOKENS, PageCopy

PROMPT = tuple(range(5 * PAGE_TOKENS + 1))


def holder(num_pages: int, salt: str = "", *, may_read_cache: bool = True) -> Holder:
    return Holder(salt, num_pages, may_read_cache=may_read_cache, may_write_cache=True)


def admit(
    memory: KvMemory, entrant: Holder, num_pages: int, lower: list[Holder], prompt: tuple[int, ...] = (1,)
) -> int:
    num_cached = memory.admit(entrant, prompt)
    assert memory.prepare(entrant, num_pages * PAGE_TOKENS, lower)
    return num_cached


def test_promises_count_device_and_host_together_and_come_back() -> None:
    memory = KvMemory(num_pages=4, num_host_pages=3)
    assert memory.can_promise(7)
    assert not memory.can_promise(8)
    first = holder(5)
    admit(memory, first, 1, [])
    assert memory.can_promise(2)
    assert not memory.can_promise(3)
    memory.release(first)
    assert memory.can_promise(7)


def test_the_last_sequence_loses_its_last_pages_first() -> None:
    memory = KvMemory(num_pages=6, num_host_pages=6)
    middle, last, first = holder(3), holder(3), holder(4)
    admit(memory, middle, 3, [])
    admit(memory, last, 3, [])
    lost = [last.table.page_at(index) for index in (2, 1, 0)] + [middle.table.page_at(2)]
    admit(memory, first, 4, [middle, last])
    assert (middle.table.num_swapped, last.table.num_swapped) == (1, 3)
    copies = memory.take_copies()
    assert [copy.source for copy in copies] == lost
    assert all(copy.is_to_host for copy in copies)
    assert len({copy.target for copy in copies}) == 4
    memory.check_integrity([first, middle, last])


def test_a_sequence_that_cannot_have_all_its_pages_takes_none() -> None:
    memory = KvMemory(num_pages=4, num_host_pages=4)
    first, second, third = holder(3), holder(3), holder(1)
    admit(memory, first, 3, [])
    admit(memory, third, 1, [])
    memory.admit(second, (1,))
    assert not memory.prepare(second, 3 * PAGE_TOKENS, [third])
    assert (third.table.num_swapped, memory.take_copies()) == (0, ())


def test_a_page_that_somebody_further_up_shares_stays() -> None:
    memory = KvMemory(num_pages=8, num_host_pages=16)
    above, below, needy = holder(5), holder(6), holder(3)
    admit(memory, above, 5, [], PROMPT)
    memory.name_full_pages(above, PROMPT)
    assert admit(memory, below, 6, [], PROMPT) == 5 * PAGE_TOKENS
    memory.admit(needy, (1,))
    assert memory.prepare(needy, 3 * PAGE_TOKENS, [below])
    assert below.table.swapped_entries() == [5], "its own page makes room, those it shares with the one above would not"
    assert len(memory.take_copies()) == 1
    memory.check_integrity([above, below, needy])


def test_what_is_swapped_back_is_copied_back_to_where_the_table_says() -> None:
    memory = KvMemory(num_pages=2, num_host_pages=2)
    low, high = holder(2), holder(2)
    admit(memory, low, 2, [])
    admit(memory, high, 2, [low])
    hosts = dict(zip(low.table.swapped_entries(), low.table.host_pages[::-1], strict=True))
    memory.take_copies()
    memory.release(high)
    assert memory.prepare(low, 2 * PAGE_TOKENS, [])
    assert memory.take_copies() == tuple(
        PageCopy(hosts[index], page_id, is_to_host=False) for index, page_id in enumerate(low.table.page_ids)
    )
    assert low.table.num_swapped == 0
    memory.check_integrity([low])


def test_the_host_has_room_for_shared_pages_too() -> None:
    """Two that share pages need twice the room on the host: so they go before anybody above them loses a page."""
    memory = KvMemory(num_pages=10, num_host_pages=9)
    middle, one, two, short, high = holder(4, "m"), holder(5), holder(5), holder(1, "s"), holder(4, "h")
    admit(memory, middle, 4, [])
    admit(memory, one, 5, [], PROMPT)
    memory.name_full_pages(one, PROMPT)
    assert admit(memory, two, 5, [], PROMPT) == 5 * PAGE_TOKENS
    assert memory.can_promise(5)
    admit(memory, short, 1, [high, middle, one, two])
    admit(memory, high, 4, [middle, one, two])
    assert middle.table.num_swapped == 0
    assert one.table.swapped_entries() == two.table.swapped_entries() == [1, 2, 3, 4]
    memory.release(short)
    assert memory.prepare(middle, 4 * PAGE_TOKENS, [one, two])
    memory.check_integrity([high, middle, one, two])


def test_a_sequence_that_ends_while_swapped_gives_back_both_kinds() -> None:
    memory = KvMemory(num_pages=3, num_host_pages=3)
    low, high = holder(3), holder(2)
    admit(memory, low, 3, [])
    admit(memory, high, 2, [low])
    assert low.table.num_swapped == 2
    memory.release(low)
    memory.check_integrity([high])
    memory.release(high)
    assert memory.pool.num_available == 3
    assert memory.can_promise(6)
