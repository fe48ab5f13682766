"""Whose response is next: everybody in the order they came, and a beginning waits for one other response at most."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.triton_adapter.turns import Turns


@dataclass(eq=False)
class Taker:
    name: int
    has_sent: bool = True
    is_due: bool = False


def pop_all(turns: Turns[Taker]) -> list[int]:
    popped = []
    while (taker := turns.pop()) is not None:
        popped.append(taker.name)
    return popped


def test_streams_take_turns_in_the_order_they_came_each_once() -> None:
    turns: Turns[Taker] = Turns()
    takers = [Taker(name) for name in range(5)]
    for taker in (*takers, *takers):
        turns.add(taker)
    assert len(turns) == 5
    assert pop_all(turns) == [0, 1, 2, 3, 4]
    assert not any(taker.is_due for taker in takers)
    turns.add(takers[3])
    assert pop_all(turns) == [3]


def test_beginnings_have_every_other_turn() -> None:
    turns: Turns[Taker] = Turns()
    for name in range(4):
        turns.add(Taker(name))
    for name in (-1, -2, -3):
        turns.add(Taker(name, has_sent=False))
    assert pop_all(turns) == [-1, 0, -2, 1, -3, 2, 3]


@settings(max_examples=200)
@given(orders=st.lists(st.tuples(st.integers(0, 29), st.booleans()), min_size=1, max_size=300))
def test_nobody_waits_longer_than_its_line(orders: list[tuple[int, bool]]) -> None:
    """Whatever comes meanwhile: a beginning waits for twice those that began before it, any other for twice those before it."""
    turns: Turns[Taker] = Turns()
    takers = [Taker(name, has_sent=name >= 10) for name in range(30)]
    most_pops: dict[int, int] = {}
    for name, is_served in orders:
        if not takers[name].is_due:
            num_ahead = sum(taker.is_due and taker.has_sent == takers[name].has_sent for taker in takers)
            most_pops[name] = 2 * (num_ahead + 1)
        turns.add(takers[name])
        if is_served:
            taker = turns.pop()
            assert taker is not None
            del most_pops[taker.name]
            taker.has_sent = True
            most_pops = {waiting: most - 1 for waiting, most in most_pops.items()}
            assert all(most > 0 for most in most_pops.values()), "somebody waits too long"
        assert {taker.name for taker in takers if taker.is_due} == set(most_pops)
        assert len(turns) == len(most_pops)
