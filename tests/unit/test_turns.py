"""Whose response is next: nobody is forgotten, few streams never wait, many are spaced, and beginnings go first."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.triton_adapter.turns import NUM_CROWDED, SPACING_S, Turns


@dataclass(eq=False)
class Taker:
    name: int
    has_sent: bool = True
    last_sent_s: float = 0.0
    is_due: bool = False
    may_join: bool = True


def pop_all(turns: Turns[Taker], now_s: float) -> list[int]:
    popped = []
    while (taker := turns.pop(now_s)) is not None:
        popped.append(taker.name)
    return popped


def busy_turns() -> Turns[Taker]:
    turns: Turns[Taker] = Turns()
    turns.observe(0.9)
    return turns


def test_few_streams_take_turns_and_never_wait() -> None:
    turns = busy_turns()
    takers = [Taker(name, last_sent_s=10.0) for name in range(NUM_CROWDED)]
    for taker in takers:
        turns.add(taker, 10.0)
        turns.add(taker, 10.0)
    assert len(turns) == NUM_CROWDED, "each is there once"
    assert turns.wait_s(10.0) == float("inf")
    assert pop_all(turns, 10.0) == list(range(NUM_CROWDED))


def test_many_streams_are_spaced_from_their_own_last_response() -> None:
    turns = busy_turns()
    for name in range(NUM_CROWDED):
        turns.add(Taker(name), 10.0)
    late, later = Taker(1001, last_sent_s=10.05), Taker(1002, last_sent_s=10.09)
    turns.add(later, 10.1)
    turns.add(late, 10.1)
    turns.add(Taker(1003, last_sent_s=10.1 - SPACING_S), 10.1)
    assert pop_all(turns, 10.1) == [*range(NUM_CROWDED), 1003]
    assert abs(turns.wait_s(10.1) - (SPACING_S - 0.05)) < 1e-9
    assert pop_all(turns, 10.05 + SPACING_S) == [1001]
    assert not late.is_due
    assert later.is_due
    assert pop_all(turns, float("inf")) == [1002]
    assert len(turns) == 0


def test_only_a_busy_sender_spaces_and_only_what_may_share_a_response() -> None:
    for busy_shares, may_join, is_spaced in (
        ((0.5,), True, False),
        ((0.9, 0.5), True, True),
        ((0.9, 0.2), True, False),
        ((0.9, 0.2, 0.5), True, False),
        ((0.9,), False, False),
    ):
        turns: Turns[Taker] = Turns()
        for busy_share in busy_shares:
            turns.observe(busy_share)
        for name in range(NUM_CROWDED + 1):
            turns.add(Taker(name, last_sent_s=10.0, may_join=may_join), 10.0)
        assert len(pop_all(turns, 10.0)) == NUM_CROWDED + (not is_spaced), (busy_shares, may_join)


def test_a_stream_that_has_sent_nothing_goes_before_all_others() -> None:
    turns = busy_turns()
    for name in range(2 * NUM_CROWDED):
        turns.add(Taker(name, last_sent_s=10.0), 10.0)
    turns.add(Taker(-1, has_sent=False, last_sent_s=10.0), 10.0)
    turns.add(Taker(-2, has_sent=False, last_sent_s=10.0), 10.0)
    assert pop_all(turns, 10.0) == [-1, -2, *range(NUM_CROWDED)]


@settings(max_examples=200)
@given(
    orders=st.lists(
        st.tuples(st.integers(0, 99), st.booleans(), st.sampled_from([0.0, 0.001, 0.05, 0.2])), min_size=1, max_size=400
    )
)
def test_everybody_is_served_within_the_spacing(orders: list[tuple[int, bool, float]]) -> None:
    """Whatever comes, and however often somebody is served meanwhile, a sender that keeps up serves each when it is ripe."""
    turns = busy_turns()
    takers = [Taker(name, has_sent=name % 2 == 0) for name in range(100)]
    due_since: dict[int, float] = {}
    now_s = 1.0
    for name, is_served, passes_s in orders:
        turns.add(takers[name], now_s)
        due_since.setdefault(name, now_s)
        now_s += passes_s
        while is_served and (taker := turns.pop(now_s)) is not None:
            assert taker.name in due_since, "served without having anything to send"
            del due_since[taker.name]
            taker.last_sent_s, taker.has_sent = now_s, True
        if is_served:
            assert all(now_s < since_s + SPACING_S for since_s in due_since.values()), "somebody waits too long"
        assert len(turns) == len(due_since)
        assert {taker.name for taker in takers if taker.is_due} == set(due_since)
