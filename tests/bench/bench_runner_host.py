"""What a decode step costs the host in the CUDA runner: launch, draw, result, with a device whose graphs do nothing.

    python -m tests.bench.bench_runner_host [--sequences 1 64 256] [--steps 1000] [--profile]

Everything is Python's and PyTorch's own: plan to arrays, pinned memory, copies (here from memory to memory), results; in the
processor time of the thread, which other work on the machine moves little. The driver's part is not in it: it starts two
copies and a graph, and records an event. With --profile, where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import pstats
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from backend.engine.plan import PAGE_TOKENS, StepResult
from client.load_report import percentile_ms
from tests.bench.conditions import conditions, write_results
from tests.bench.gpu.host_only_device import HostOnlyDevice
from tests.bench.gpu.models import TOY, random_runner
from tests.bench.gpu.steps import Cell, Decoding
from tests.bench.tables import runner_host_table

_CONTEXT = 1024
_WARM_UP_STEPS = 3


def step_times_s(num_sequences: int, num_steps: int, profile: cProfile.Profile | None) -> list[float]:
    """Seconds of each step, the plan of which is made before; one step ahead, as the engine does it."""
    context = _CONTEXT + _WARM_UP_STEPS + num_steps
    runner = random_runner(
        TOY,
        HostOnlyDevice(results={"is_finite": 1}),
        num_pages=num_sequences * -(-context // PAGE_TOKENS),
        max_num_seqs=num_sequences,
        max_model_len=context,
        max_step_tokens=512,
    )
    decoding = Decoding(runner, Cell(num_sequences, _CONTEXT), _WARM_UP_STEPS + num_steps)
    plans = [decoding.next_plan() for _ in range(_WARM_UP_STEPS + num_steps)]
    gc.collect()
    times_s, pending = [], None
    for index, plan in enumerate(plans):
        if profile is not None and index == _WARM_UP_STEPS:
            profile.enable()
        started = time.thread_time()
        step = runner.launch(plan)
        step.draw({})
        if pending is not None:
            assert isinstance(pending.result(), StepResult)
        times_s.append(time.thread_time() - started)
        pending = step
    if profile is not None:
        profile.disable()
    return times_s[_WARM_UP_STEPS:]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A copy of a few kilobytes is no work for several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_runner_host")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    results = conditions("tests.bench.bench_runner_host", sys.argv[1:] if argv is None else argv)
    results |= {"steps": arguments.steps, "context": _CONTEXT, "cells": []}
    for num_sequences in arguments.sequences:
        profile = cProfile.Profile() if arguments.profile else None
        with one_thread():
            times_s = step_times_s(num_sequences, arguments.steps, profile)
        cell = {
            "sequences": num_sequences,
            "p50_ms": percentile_ms(times_s, 50),
            "p99_ms": percentile_ms(times_s, 99),
        }
        results["cells"].append(cell)
        print(cell, file=sys.stderr, flush=True)
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    print(runner_host_table(results))
    if not arguments.no_results and not arguments.profile:
        write_results("runner_host", results)


if __name__ == "__main__":
    main()
