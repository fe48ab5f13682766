"""The page pool: ids are handed out once, come back once, and add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.engine.page_pool import PagePool


@given(num_pages=st.integers(0, 12), orders=st.lists(st.integers(-4, 5), max_size=40))
def test_random_traffic_adds_up(num_pages: int, orders: list[int]) -> None:
    pool = PagePool(num_pages)
    held: list[tuple[int, ...]] = []
    for order in orders:
        if order < 0 and held:
            pool.free(held.pop(order % len(held)))
        elif 0 <= order <= pool.num_free:
            held.append(pool.allocate(order))
            assert len(held[-1]) == order
        pages = [page_id for page_ids in held for page_id in page_ids]
        assert len(pages) == len(set(pages))
        assert set(pages) <= set(range(num_pages))
        assert (pool.num_held, pool.num_free) == (len(pages), num_pages - len(pages))
        pool.check_integrity(len(pages))


def test_pages_freed_last_are_handed_out_first() -> None:
    pool = PagePool(8)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.free(first)
    pool.free(second)
    assert pool.allocate(5) == (*second, *first)


def test_a_page_is_not_freed_twice() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError, match=f"page {pages[0]} was freed twice"):
        pool.free(pages)


def test_more_pages_than_there_are_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        PagePool(2).allocate(3)


def test_a_leak_is_seen() -> None:
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="1 pages are not free, sequences hold 0"):
        pool.check_integrity(0)
