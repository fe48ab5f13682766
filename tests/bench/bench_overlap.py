"""Does the host keep up with a device that takes 3 ms a step? Real Engine and Scheduler over a device that only sleeps.

    python -m tests.bench.bench_overlap [--sequences 256] [--step-ms 3] [--steps 1000] [--profile]

Prints how long the device waited between steps, what the loop's thread computed per step (its processor time, so sleeping
does not count), and with --profile where that goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import threading
import time
from collections.abc import Sequence

from backend.engine.engine import Engine
from backend.engine.events import EngineStats
from backend.engine.plan import PAGE_TOKENS
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Event, Scheduler, SchedulerLimits
from backend.runner.fake_runner import FakeRunner
from tests.bench.conditions import conditions, write_results
from tests.bench.tables import overlap_table

_PROMPT_TOKENS = 64
_TOKEN_BYTES = (*([b""] * 1000), *(bytes([byte]) for byte in range(256)))


class Loop:
    """An engine of `num_sequences` that all decode, and what its thread spent."""

    def __init__(self, num_sequences: int, step_s: float, num_steps: int) -> None:
        num_pages = num_sequences * -(-(_PROMPT_TOKENS + num_steps) // PAGE_TOKENS)
        limits = SchedulerLimits(num_pages, num_sequences, 4096, num_sequences)
        self._runner = FakeRunner(num_pages=num_pages, max_num_seqs=num_sequences, step_time_s=step_s)
        self._engine = Engine(Scheduler(limits, _TOKEN_BYTES, eos_id=2), self._runner, self._emit)
        self._num_sequences = num_sequences
        self._num_steps = num_steps
        self._num_tokens = 0
        self._profile: cProfile.Profile | None = None
        self.cpu_s = self.wall_s = self.idle_s = 0.0

    def run(self, *, is_profiled: bool) -> None:
        """Generate `num_steps` tokens a sequence; the time counts from the first to the last."""
        for handle in range(self._num_sequences):
            prompt = (1100,) * (_PROMPT_TOKENS - 1) + (1000 + handle % 256,)
            self._engine.submit(GenerationRequest(handle, "", prompt, self._num_steps, ignore_eos=True))
        thread = threading.Thread(target=self._measure, args=(is_profiled,))
        thread.start()
        thread.join()

    def _measure(self, is_profiled: bool) -> None:
        self._profile = cProfile.Profile() if is_profiled else None
        cpu_s, wall_s = time.thread_time(), time.monotonic()
        if self._profile is not None:
            self._profile.enable()
        self._engine.run()
        if self._profile is not None:
            self._profile.disable()
        self.cpu_s, self.wall_s = time.thread_time() - cpu_s, time.monotonic() - wall_s
        self.idle_s = self._runner.idle_s

    def _emit(self, events: list[Event], stats: EngineStats) -> None:
        self._num_tokens += len(events)
        if self._num_tokens >= self._num_sequences * self._num_steps:
            self._engine.stop()

    def print_profile(self) -> None:
        """The functions that took longest."""
        assert self._profile is not None
        pstats.Stats(self._profile).sort_stats("tottime").print_stats(15)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_overlap")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--step-ms", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    results = conditions("tests.bench.bench_overlap", sys.argv[1:] if argv is None else argv)
    results |= {"step_ms": arguments.step_ms, "steps": arguments.steps, "cells": []}
    for num_sequences in arguments.sequences:
        loop = Loop(num_sequences, arguments.step_ms / 1000, arguments.steps)
        loop.run(is_profiled=arguments.profile)
        cell = {
            "sequences": num_sequences,
            "idle_percent": round(100 * loop.idle_s / loop.wall_s, 2),
            "host_ms_per_step": round(1000 * loop.cpu_s / arguments.steps, 3),
            "step_ms": round(1000 * loop.wall_s / arguments.steps, 3),
        }
        results["cells"].append(cell)
        print(cell, file=sys.stderr, flush=True)
        if arguments.profile:
            loop.print_profile()
    print(overlap_table(results))
    if not arguments.no_results and not arguments.profile:
        write_results("overlap", results)


if __name__ == "__main__":
    main()
