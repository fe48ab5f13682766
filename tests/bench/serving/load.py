"""Keeps a way of serving busy with one scenario: a closed loop at its capacity, then requests that arrive by themselves."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench.serving.scale import Scale
from tests.bench.serving.scenarios import Scenario, make_prompt, poisson_arrivals
from tests.bench.serving.steady import RequestRecord, Window, plateau, summarise
from tests.bench.serving.way import ServingError, Way

NO_TIME = "no time left"
_TURN_S = 0.05
_STARTS_AT_A_TIME = 2
_RECENT = 16


class Load:
    """One scenario on one way. `handles` numbers the requests of the whole run, and so the prompts.

    Nothing is waited for longer than `patience_s`, beyond the windows themselves.
    """

    def __init__(
        self,
        way: Way,
        scenario: Scenario,
        handles: Iterator[int],
        *,
        patience_s: float,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.records: list[RequestRecord] = []
        self._way = way
        self._scenario = scenario
        self._handles = handles
        self._patience_s = patience_s
        self._now_s = now_s
        self._running: dict[int, RequestRecord] = {}
        self._is_closed_loop = False

    def capacity(self, window_s: float) -> dict[str, Any]:
        """Numbers of the steady state with always as many requests as the scenario says, over `window_s`.

        Or a multiple of it, until as many tokens came as requests run. ServingError when that, or the steady state, does not come
        within the patience.
        """
        level, began_s = self._scenario.num_concurrent, self._now_s()
        self._ramp_up(began_s + self._patience_s)
        self._is_closed_loop = True
        while (steady := plateau(self.records, level)) is None:
            self._turn(_TURN_S)
            self._check(began_s + self._patience_s)
        window, numbers = Window(steady.begin_s, steady.begin_s), dict[str, Any](output_tokens=0)
        while numbers["output_tokens"] < level:
            window = Window(window.begin_s, window.end_s + window_s)
            self._run_until_counted(window, lambda: self._turn(_TURN_S))
            numbers = summarise(self.records, window, self._now_s())
            self._check(window.begin_s + window_s + self._patience_s)
        steady = plateau(self.records, level)
        assert steady is not None
        assert steady.end_s >= window.end_s, "a closed loop replaces each request that ends"
        return {"ramp_up_s": round(steady.begin_s - began_s, 3)} | numbers | self._requests_per_s(numbers)

    def poisson(
        self, rate_per_s: float, num_in_flight: int, *, settle_s: float, window_s: float, seed: int
    ) -> dict[str, Any]:
        """Numbers under Poisson arrivals of `rate_per_s`, over `window_s` after `settle_s`.

        Follows a load with more in flight: so many are taken back that `num_in_flight` stay, drawn by `seed`.
        """
        self._is_closed_loop = False
        running = sorted(self._running)
        for handle in random.Random(seed).sample(running, max(0, len(running) - num_in_flight)):
            self._take_back(handle)
        self.records = list(self._running.values())
        began_s = self._now_s()
        arrivals = (began_s + after_s for after_s in poisson_arrivals(rate_per_s, seed))
        next_s = next(arrivals)

        def turn() -> None:
            nonlocal next_s
            while next_s <= self._now_s():
                self._submit(next_s, self._scenario)
                next_s = next(arrivals)
            self._turn(min(_TURN_S, next_s - self._now_s()))

        window = Window(began_s + settle_s, began_s + settle_s + window_s)
        self._run_until_counted(window, turn)
        numbers = summarise(self.records, window, self._now_s())
        arrived = sum(record.due_s in window for record in self.records)
        about = {
            "rate_per_s": round(rate_per_s, 4),
            "arrived": arrived,
            "in_flight_at_end": self._in_flight(window.end_s),
        }
        return about | numbers | self._requests_per_s(numbers)

    def end(self) -> None:
        """Take back everything and wait until nothing runs: the ramp-down, which nobody measures."""
        self._is_closed_loop = False
        for handle in tuple(self._running):
            self._take_back(handle)
        self._way.wait_until_idle()
        self._way.progress(0.0)

    def _ramp_up(self, until_s: float) -> None:
        """Begin requests of such ages that they are spread evenly over the whole length of an answer when the last one begins.

        So from then on one ends every N / C steps (N output tokens, C concurrent requests), as it does later, and contexts are
        as long as later. Only few wait for their first token at a time, and the number of tokens that the others gain meanwhile
        is counted off. Where that is more than N / C, prompts are the bottleneck, and requests queue for them, as later.
        """
        level, num_output = self._scenario.num_concurrent, self._scenario.output_tokens
        self._submit(self._now_s(), self._scenario)  # whose tokens count what is gained
        while (num_missing := level - len(self._running)) > 0:
            spacing = num_output / level - self._gained_per_start()
            num_silent = sum(not record.times_s for record in self._running.values())
            if spacing <= 0 or num_output == 1:
                for _ in range(num_missing):
                    self._submit(self._now_s(), self._scenario)
                return
            if num_silent < _STARTS_AT_A_TIME and any(record.times_s for record in self.records):
                age = min(round(num_missing * spacing), num_output - 1)
                self._submit(self._now_s(), self._scenario.aged(age))
            self._turn(_TURN_S)
            self._check(until_s)

    def _gained_per_start(self) -> float:
        """Tokens that a running request gets while another one is begun: time between starts over that for a token; first 0."""
        known = [record for record in self.records if record.times_s]
        recent = known[-_RECENT:]
        sources = [*known[:1], *recent]
        token_s = sum(record.times_s[-1] - record.times_s[0] for record in sources)
        num_tokens = sum(sum(record.counts[1:]) for record in sources)
        if len(recent) < 2 or not num_tokens:
            return 0.0
        start_s = (recent[-1].times_s[0] - recent[0].times_s[0]) / (len(recent) - 1)
        return start_s * num_tokens / token_s

    def _check(self, until_s: float) -> None:
        if self._now_s() > until_s:
            num_silent = sum(not record.times_s for record in self.records)
            raise ServingError(
                f"no steady state of {self._scenario.num_concurrent} requests after {self._patience_s:g} s: "
                f"{len(self._running)} run, {num_silent} of {len(self.records)} had no token"
            )

    def _run_until_counted(self, window: Window, turn: Callable[[], None]) -> None:
        """The load goes on behind the window until every request that was due in it has its first token."""
        while self._now_s() < window.end_s + self._patience_s:
            is_behind = self._now_s() > window.end_s
            turn()  # and where it began behind the window, all that was due in that is submitted now
            if is_behind and all(record.times_s for record in self.records if record.due_s in window):
                return

    def _turn(self, timeout_s: float) -> None:
        for handle, num_tokens, at_s, is_end in self._way.progress(max(0.0, timeout_s)):
            record = self._running.get(handle)
            if record is None:  # was taken back
                continue
            if num_tokens:
                record.add(at_s, num_tokens)
            if is_end:
                if sum(record.counts) != record.num_tokens:
                    raise ServingError(f"a request gave {sum(record.counts)} tokens instead of {record.num_tokens}")
                record.ended_s = at_s
                del self._running[handle]
                if self._is_closed_loop:
                    self._submit(at_s, self._scenario)

    def _submit(self, due_s: float, request: Scenario) -> None:
        handle = next(self._handles)
        record = RequestRecord(due_s, request.output_tokens)
        self.records.append(record)
        self._running[handle] = record
        self._way.submit(handle, make_prompt(handle, request.prompt_tokens), request.output_tokens)

    def _take_back(self, handle: int) -> None:
        self._running.pop(handle).ended_s = self._now_s()
        self._way.take_back(handle)

    def _in_flight(self, at_s: float) -> int:
        return sum(record.due_s <= at_s < record.ended_s for record in self.records)

    def _requests_per_s(self, numbers: dict[str, Any]) -> dict[str, float]:
        """By tokens: whole requests that end in a window are few, and whether one more does is chance."""
        return {"requests_per_s": round(numbers["tokens_per_s"] / self._scenario.output_tokens, 4)}


def measure(
    way: Way,
    scenario: Scenario,
    handles: Iterator[int],
    scale: Scale,
    *,
    shares: tuple[float, ...],
    time_is_left: Callable[[], bool],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """A scenario's capacity, then its latency at `shares` of that, the largest first; `keep` gets the cell after each number."""
    load = Load(way, scenario, handles, patience_s=scale.patience_s)
    capacity = load.capacity(scale.window_s)
    poisson: list[dict[str, Any]] = []
    keep({"capacity": capacity, "poisson": poisson})
    for seed, share in enumerate(sorted(shares, reverse=True)):
        numbers: dict[str, Any] = {"skipped": NO_TIME}
        if time_is_left():
            in_flight, rate = math.ceil(share * scenario.num_concurrent), share * capacity["requests_per_s"]
            numbers = load.poisson(rate, in_flight, settle_s=scale.settle_s, window_s=scale.window_s, seed=seed)
        poisson.append({"load": share} | numbers)
        keep({"capacity": capacity, "poisson": poisson})
    load.end()
