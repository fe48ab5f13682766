"""What of a load counts, and the numbers of it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from client.load_report import percentile_ms


@dataclass
class RequestRecord:
    """One request of `num_tokens`: when it was due, when how many of them came, and when it ended; seconds of one clock."""

    due_s: float
    num_tokens: int
    times_s: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("l"))
    ended_s: float = math.inf

    def add(self, at_s: float, num_tokens: int) -> None:
        """Note tokens that came together."""
        self.times_s.append(at_s)
        self.counts.append(num_tokens)


@dataclass(frozen=True)
class Window:
    """A time that counts: the moments `at_s` with begin_s < at_s <= end_s."""

    begin_s: float
    end_s: float

    def __contains__(self, at_s: float) -> bool:
        return self.begin_s < at_s <= self.end_s

    @property
    def length_s(self) -> float:
        """Seconds."""
        return self.end_s - self.begin_s


def plateau(records: Sequence[RequestRecord], level: int) -> Window | None:
    """The steady state of `level` requests at a time: ramp-up and ramp-down cut off. None while it has not begun.

    It begins when `level` requests are in flight and each of those has had a token, so that no prompt of the ramp-up is left; it
    ends when fewer are in flight. A request that is due in the moment in which another ends takes its place. Of several such
    times it is the last: a ramp-up may touch the level before.
    """
    changes = [(record.due_s, 0, 1) for record in records]
    changes += [(record.ended_s, 1, -1) for record in records if record.ended_s < math.inf]
    num_in_flight, steady = 0, None
    for at_s, _, change in sorted(changes):
        num_in_flight += change
        if change > 0 and num_in_flight == level:
            first = [record for record in records if record.due_s <= at_s < record.ended_s]
            has_begun = all(record.times_s for record in first)
            steady = Window(max(record.times_s[0] for record in first), math.inf) if has_begun else None
        elif steady is not None and num_in_flight < level and steady.end_s == math.inf:
            steady = Window(steady.begin_s, at_s) if at_s > steady.begin_s else None
    return steady


def summarise(records: Sequence[RequestRecord], window: Window, now_s: float) -> dict[str, Any]:
    """The numbers of a window.

    tokens_per_s: tokens that came in it. first_token_*: from the moment in which a request was due, of those due in it; one
    that has none at `now_s` counts with what it has waited, and is counted. inter_token_*: of each request, its time for
    a token between its first and its last response in the window. gap_*: between two responses, which may carry
    several tokens.
    """
    num_tokens, num_ended, in_flight_s, num_waiting = 0, 0, 0.0, 0
    first_tokens_s, inter_tokens_s, gaps_s = [], [], []
    for record in records:
        inside = [place for place, at_s in enumerate(record.times_s) if at_s in window]
        num_tokens += sum(record.counts[place] for place in inside)
        num_ended += record.ended_s in window
        in_flight_s += max(0.0, min(record.ended_s, window.end_s) - max(record.due_s, window.begin_s))
        gaps_s += [record.times_s[b] - record.times_s[a] for a, b in pairwise(inside)]
        if (num_behind := sum(record.counts[place] for place in inside[1:])) > 0:
            inter_tokens_s.append((record.times_s[inside[-1]] - record.times_s[inside[0]]) / num_behind)
        if record.due_s in window:
            num_waiting += not record.times_s
            first_tokens_s.append((record.times_s[0] if record.times_s else now_s) - record.due_s)
    numbers: dict[str, Any] = {
        "seconds": round(window.length_s, 3),
        "in_flight": round(in_flight_s / window.length_s, 2),
        "output_tokens": num_tokens,
        "requests_ended": num_ended,
        "tokens_per_s": round(num_tokens / window.length_s, 1),
        "first_tokens": len(first_tokens_s),
        "without_first_token": num_waiting,
    }
    for name, values in (("first_token", first_tokens_s), ("inter_token", inter_tokens_s), ("gap", gaps_s)):
        numbers |= {f"{name}_p{percent}_ms": percentile_ms(values, percent) for percent in (50, 90, 99)}
    return numbers
