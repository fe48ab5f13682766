"""Host time of one engine step: plan, commit, text, events, the message to the owner; the device costs nothing.

    python -m tests.bench.bench_scheduler

All sequences decode, each ends at its own time and is replaced by a new one, as in a server under load. Printed is the
median of many steps, without and with two stop strings per request.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Iterator

import msgspec

from backend.engine import messages
from backend.engine.events import Event, TokenEvent
from backend.engine.plan import StepPlan
from backend.engine.request import GenerationRequest, SamplingParams
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.runner.fake_runner import FakeRunner, FakeStep
from tests.bench.conditions import conditions, write_results
from tests.bench.tables import scheduler_table

_FIRST_ID = 1000
_TOKEN_BYTES = (b"",) * _FIRST_ID + tuple(bytes([byte]) for byte in range(256))
_NUM_STEPS = 300
_NUM_WARM_UP_STEPS = 60
_STOPS = (b"\nUser:", b"\n\n\n")


class Load:
    """A scheduler with `num_running` sequences, kept full, one step ahead."""

    def __init__(self, num_running: int, stop_strings: tuple[bytes, ...]) -> None:
        limits = SchedulerLimits(
            num_pages=num_running * 8,
            max_num_seqs=num_running,
            max_step_tokens=num_running + 2048,
            max_queued_requests=num_running + 8,
            default_deadline_ms=600_000,
        )
        self._scheduler = Scheduler(limits, _TOKEN_BYTES, eos_id=2)
        self._runner = FakeRunner(num_pages=limits.num_pages, max_num_seqs=num_running)
        self._requests = self._make_requests(stop_strings)
        for _ in range(num_running):
            self._scheduler.add(next(self._requests), time.monotonic_ns())
        self._in_flight: tuple[StepPlan, FakeStep] | None = None

    def step_times_us(self) -> dict[str, float]:
        """One turn of the loop, in microseconds by part."""
        marks = [time.perf_counter_ns()]
        events = self._scheduler.expire(time.monotonic_ns())
        plan = self._scheduler.plan(time.monotonic_ns())
        marks.append(time.perf_counter_ns())
        launched = None if plan is None else (plan, self._runner.launch(plan))
        marks.append(time.perf_counter_ns())
        if self._in_flight is not None:
            events += self._scheduler.commit(self._in_flight[0], self._in_flight[1].result(), time.monotonic_ns())
        marks.append(time.perf_counter_ns())
        stats = self._scheduler.stats()
        msgspec.msgpack.encode(messages.Step.of(events, stats))
        marks.append(time.perf_counter_ns())
        self._in_flight = launched
        self._replace_finished(events)
        plan_us, _, commit_us, message_us = ((b - a) / 1000 for a, b in itertools.pairwise(marks))
        return {"plan": plan_us, "commit": commit_us, "message": message_us, "total": plan_us + commit_us + message_us}

    def _replace_finished(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, TokenEvent) and event.finish is not None:
                self._scheduler.add(next(self._requests), time.monotonic_ns())

    @staticmethod
    def _make_requests(stop_strings: tuple[bytes, ...]) -> Iterator[GenerationRequest]:
        for handle in itertools.count(1):
            yield GenerationRequest(
                handle=handle,
                request_id="",
                prompt_token_ids=tuple(range(_FIRST_ID + 65, _FIRST_ID + 97)),
                max_tokens=200 + handle * 37 % 200,
                sampling=SamplingParams(temperature=0.8, seed=handle),
                stop_strings=stop_strings,
                stream=True,
            )


def main() -> None:
    """Measure, print the table and keep it."""
    results = conditions("tests.bench.bench_scheduler", ()) | {"cells": []}
    for num_running, stops in itertools.product((1, 64, 256, 1024), ((), _STOPS)):
        load = Load(num_running, stops)
        for _ in range(_NUM_WARM_UP_STEPS):
            load.step_times_us()
        gc.collect()
        steps = [load.step_times_us() for _ in range(_NUM_STEPS)]
        medians = {f"{name}_us": round(statistics.median(step[name] for step in steps), 1) for name in steps[0]}
        results["cells"].append({"sequences": num_running, "stop_strings": len(stops)} | medians)
        print(results["cells"][-1], file=sys.stderr, flush=True)
    print(scheduler_table(results))
    write_results("scheduler", results)


if __name__ == "__main__":
    main()
