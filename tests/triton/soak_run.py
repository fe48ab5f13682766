"""Known requests sent to a live server, many at a time, and everything that came of them held against what must be."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tests.triton.live_server import LiveServer
from tests.triton.metrics import read_metrics, wait_until_idle
from tests.triton.mixed_requests import mixed_request
from tests.triton.soak_call import BAD, Call, Fate, Truth, call_server, truth_of

_PROGRESS_PERIOD_S = 5.0
_IDLE_TIMEOUT_S = 30.0
_SHOWN_PROBLEMS = 10
_PAGES = ("used", "cached", "free")


@dataclass(frozen=True)
class SoakReport:
    """What happened, and everything that was not as it must be."""

    num_calls: int
    wall_s: float
    fates: dict[str, int]
    num_tokens: int
    num_preemptions: int
    num_prefix_hit_tokens: int
    problems: tuple[str, ...]

    def numbers(self) -> dict[str, Any]:
        """For the results file."""
        numbers = asdict(self) | {"wall_s": round(self.wall_s, 1), "num_problems": len(self.problems)}
        return numbers | {"problems": self.problems[:_SHOWN_PROBLEMS]}

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self.fates.items())
        lines = [
            f"{self.num_calls} requests in {self.wall_s:.0f} s ({fates}); {self.num_tokens:,} tokens received, "
            f"{self.num_preemptions:,} preemptions, {self.num_prefix_hit_tokens:,} prompt tokens from the prefix cache; "
            f"{len(self.problems)} problems",
            *self.problems[:_SHOWN_PROBLEMS],
        ]
        return "\n".join(lines)


class Beside(Protocol):
    """Something else that asks the server, from `start` on; `end` says how many requests that were."""

    def start(self) -> None: ...

    def end(self) -> int: ...


def make_truths(server: LiveServer, seed: int, count: int, *, progress: bool = False) -> list[Truth]:
    """`count` distinct requests, each served by itself."""
    truths = []
    for index in range(count):
        truths.append(truth_of(server, index, mixed_request(seed, index)))
        if progress and index % 50 == 49:
            print(f"{index + 1}/{count} requests answered alone", file=sys.stderr, flush=True)
    return truths


def make_calls(truths: Sequence[Truth], seed: int, count: int) -> list[Call]:
    """`count` calls of random ones among them, by random ways, with random fates."""
    rng = random.Random(seed)
    return [Call.draw(rng, number, rng.choice(truths)) for number in range(count)]


def soak(
    server: LiveServer,
    calls: Iterable[Call],
    at_once: int,
    max_seconds: float,
    progress: bool,
    beside: Beside | None = None,
) -> SoakReport:
    """Send all calls, `at_once` at a time, and hold every answer and the metrics against what must be.

    `calls` may be drawn while it runs; whatever of them is not sent within `max_seconds` is a problem. `beside` asks
    the server at the same time.
    """
    wait_until_idle(server, _IDLE_TIMEOUT_S)
    before, tally = read_metrics(server), _Tally()
    end_s = tally.started_s + max_seconds
    if beside is not None:
        beside.start()
    remaining, lock, is_over = iter(calls), threading.Lock(), threading.Event()

    def work() -> None:
        while time.monotonic() < end_s and not is_over.is_set():
            with lock:
                call = next(remaining, None)
            if call is None:
                return
            try:
                tally.add(call, *call_server(server, call))
            except Exception as error:  # whatever it is, it is an answer that is not right
                tally.add_problem(call, f"{call}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(at_once) as pool:
        workers = [pool.submit(work) for _ in range(at_once)]
        try:
            while wait(workers, _PROGRESS_PERIOD_S).not_done:
                if progress:
                    print(tally, file=sys.stderr, flush=True)
        finally:
            is_over.set()  # also when this is interrupted
    if beside is not None:
        tally.num_others = beside.end()
    wall_s = time.monotonic() - tally.started_s
    problems = tally.problems
    if next(remaining, None) is not None:
        problems.append(f"not all were sent within {max_seconds:.0f} s")
    change: dict[str, float] = {}
    try:
        wait_until_idle(server, _IDLE_TIMEOUT_S)
        after = read_metrics(server)
        change = {name: value - before.get(name, 0.0) for name, value in after.items()}
        problems += _accounts(tally, before, after)
    except AssertionError as error:
        problems.append(str(error))
    return SoakReport(
        tally.num_calls,
        wall_s,
        dict(sorted(tally.fates.items())),
        tally.num_tokens,
        int(change.get("nemo_preemptions_total", 0)),
        int(change.get("nemo_prefix_hit_tokens_total", 0)),
        tuple(problems),
    )


class _Tally:
    """What has come of the calls so far; threads may add to it."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.num_calls = self.num_tokens = 0
        self.num_reaching = self.num_surely_reaching = self.num_others = 0
        self.fates: Counter[str] = Counter()
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def add(self, call: Call, fate: str, num_tokens: int) -> None:
        """Count a call that ended as it must."""
        with self._lock:
            self._count(call)
            self.fates[fate] += 1
            self.num_tokens += num_tokens

    def add_problem(self, call: Call, problem: str) -> None:
        """Count a call that did not."""
        with self._lock:
            self._count(call)
            self.problems.append(problem)

    def _count(self, call: Call) -> None:
        self.num_calls += 1
        reaches = not (call.fate is Fate.BAD and BAD[call.bad].is_refused_early)
        self.num_reaching += reaches
        self.num_surely_reaching += reaches and call.fate is not Fate.CANCELLED_AT_ONCE

    def __str__(self) -> str:
        done = f"{self.num_calls} requests, {self.num_tokens} tokens, {len(self.problems)} problems"
        return f"{time.monotonic() - self.started_s:6.0f} s  {done}"


def _accounts(tally: _Tally, before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What the metrics say that they should not, once the server is idle."""
    problems = []
    num_before, num_after = (sum(at[f"nemo_kv_pages_{name}"] for name in _PAGES) for at in (before, after))
    if after["nemo_kv_pages_used"] or num_after != num_before:
        problems.append(
            f"pages are missing: {after['nemo_kv_pages_used']:.0f} used, {num_after:.0f} of {num_before:.0f} known"
        )
    if after["nemo_engine_restarts_total"] != before["nemo_engine_restarts_total"]:
        problems.append("the engine was restarted")
    answered = sum(after[name] - before[name] for name in ("request_success_total", "request_failure_total"))
    least, most = tally.num_surely_reaching + tally.num_others, tally.num_reaching + tally.num_others
    if not least <= answered <= most:
        reached = f"{least} to {most}"
        problems.append(f"{answered:.0f} requests were answered, of {reached} that reached the engine")
    return problems
