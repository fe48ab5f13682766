"""The page pool: every page is free, referenced or cached; cached ones go in the order of their last use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.engine.page_pool import PagePool

ORDERS = st.tuples(st.sampled_from(["allocate", "release", "share", "keep"]), st.integers(0, 11))


@given(num_pages=st.integers(0, 12), orders=st.lists(ORDERS, max_size=60))
def test_random_traffic_adds_up(num_pages: int, orders: list[tuple[str, int]]) -> None:
    evicted: list[int] = []
    pool = PagePool(num_pages, evicted.append)
    held: list[list[int]] = []
    kept: set[int] = set()
    for order, number in orders:
        if order == "allocate" and number <= pool.num_available:
            held.append(pool.allocate(number))
            assert len(held[-1]) == number
            kept -= set(held[-1])
        elif held and order == "release":
            pool.release(held.pop(number % len(held)))
        elif held and order == "share":
            held.append(list(held[number % len(held)]))
            pool.share(held[-1])
        elif order == "keep":
            for page_id in held[number % len(held)] if held else ():
                pool.keep(page_id)
                kept.add(page_id)
        references = [page_id for page_ids in held for page_id in page_ids]
        assert all(pool.num_references(page_id) == references.count(page_id) for page_id in range(num_pages))
        assert pool.num_referenced == len(set(references))
        assert pool.num_cached == len(kept - set(references))
        assert pool.num_available == num_pages - len(set(references))
        pool.check_integrity(references)


def test_the_page_used_longest_ago_is_evicted_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    evicted: list[int] = []
    pool = PagePool(5, evicted.append)
    first, second = pool.allocate(2), pool.allocate(2)
    for page_id in (*first, *second):
        pool.keep(page_id)
    pool.release(first)
    pool.release(second)
    pool.allocate(1)
    assert evicted == [], "a free page is taken before a cached one"
    pool.share([first[0]])
    pool.release([first[0]])
    pool.allocate(4)
    assert evicted == [first[1], second[1], second[0], first[0]]


def test_an_evicted_page_is_not_kept_again_by_its_next_owner() -> None:
    pool = PagePool(1)
    page = pool.allocate(1)
    pool.keep(page[0])
    pool.release(page)
    pool.release(pool.allocate(1))
    assert (pool.num_cached, pool.num_available) == (0, 1)


def test_a_page_is_not_released_too_often() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match=f"page {pages[0]} was released too often"):
        pool.release(pages)


def test_more_pages_than_there_are_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="3 pages wanted, 2 available"):
        PagePool(2).allocate(3)


def test_a_page_without_an_owner_cannot_be_kept() -> None:
    with pytest.raises(AssertionError, match="page 0 has no owner"):
        PagePool(1).keep(0)


def test_a_leak_is_seen() -> None:
    pool = PagePool(4)
    (page_id,) = pool.allocate(1)
    with pytest.raises(AssertionError, match=f"page {page_id} counts 1 references, sequences have 0"):
        pool.check_integrity([])
