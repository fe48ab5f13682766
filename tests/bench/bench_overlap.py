"""Does the host keep up with the device? Real Engine and Scheduler in front of one that only sleeps.

    python -m tests.bench.bench_overlap [--steps 2000] [--cells 1x1 64x3 256x3] [--profile]

A cell is sequences x milliseconds a step. Each is run twice: the loop alone, in this process, and the whole engine process with
this one as its owner, which takes every message and reports what it took. Sequences end at their own times and are replaced.
Printed is how long the device waited between steps and what the loop's thread computed per step (its processor time, so sleeping
does not count); with --profile where that goes, for the loop alone. On a machine that others use too, what they take shows as
waiting: put `chrt --fifo 5` before the command there (as root), and the results say so.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import json
import multiprocessing
import os
import pstats
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from backend.engine import messages
from backend.engine.engine import Engine
from backend.engine.events import EngineStats, Event, TokenEvent
from backend.engine.plan import PAGE_TOKENS
from backend.engine.request import GenerationRequest
from backend.engine.scheduler import Scheduler, SchedulerLimits
from backend.settings import Settings
from tests.bench.conditions import conditions, write_results
from tests.bench.paced_runner import PacedRunner
from tests.bench.tables import overlap_table
from tests.checkpoints import write_tekken

_PROMPT_TOKENS = 64
_MOST_TOKENS = 600
_PAGES_PER_SEQUENCE = -(-(_PROMPT_TOKENS + _MOST_TOKENS) // PAGE_TOKENS)
_MOST_STEP_TOKENS = 1024
_NUM_SKIPPED = 100
"""Steps in which all begin at once."""
_VOCAB_SIZE = 1300


def requests() -> Iterator[GenerationRequest]:
    """Prompts of 64 tokens, all different, and outputs of 400 to 600."""
    for handle in itertools.count(1):
        prompt = (1100,) * (_PROMPT_TOKENS - 2) + (1000 + handle // 256 % 256, 1000 + handle % 256)
        num_tokens = _MOST_TOKENS - 200 + handle * 37 % 200
        yield GenerationRequest(handle, "", prompt, num_tokens, ignore_eos=True, stream=True)


class Loop:
    """The loop alone, one request for each of `num_sequences` at any time."""

    def __init__(self, num_sequences: int, step_s: float, num_steps: int) -> None:
        num_pages = num_sequences * _PAGES_PER_SEQUENCE
        limits = SchedulerLimits(num_pages, num_sequences, _MOST_STEP_TOKENS, 2 * num_sequences)
        token_bytes = (*([b""] * 1000), *(bytes([byte]) for byte in range(256)))
        self._runner = PacedRunner(num_pages=num_pages, max_num_seqs=num_sequences, step_time_s=step_s)
        self._engine = Engine(Scheduler(limits, token_bytes, eos_id=2), self._runner, self._emit)
        self._num_sequences, self._num_steps = num_sequences, num_steps
        self._requests = requests()
        self._profile: cProfile.Profile | None = None

    def run(self, *, is_profiled: bool = False) -> dict[str, float | None]:
        """Take `num_steps` steps behind the first ones, in a thread of its own."""
        for request in itertools.islice(self._requests, self._num_sequences):
            self._engine.submit(request)
        thread = threading.Thread(target=self._serve, args=(is_profiled,))
        thread.start()
        thread.join()
        if self._profile is not None:
            pstats.Stats(self._profile).sort_stats("tottime").print_stats(15)
        return self._runner.summary(_NUM_SKIPPED)

    def _serve(self, is_profiled: bool) -> None:
        if is_profiled:
            with cProfile.Profile() as self._profile:
                self._engine.run()
        else:
            self._engine.run()

    def _emit(self, events: list[Event], stats: EngineStats) -> None:
        for event in events:
            if isinstance(event, TokenEvent) and event.is_request_end:
                self._engine.submit(next(self._requests))
        if stats.num_steps > self._num_steps + _NUM_SKIPPED:
            self._engine.stop()


def run_process(num_sequences: int, step_s: float, num_steps: int) -> dict[str, float | None]:
    """The same through the engine's process: its threads, its messages, and an owner that reads them."""
    ours, theirs = multiprocessing.Pipe(duplex=True)
    with tempfile.TemporaryDirectory() as folder:
        write_tekken(Path(folder, "tekken.json"), _VOCAB_SIZE)
        settings = Settings(
            checkpoint=folder,
            runner="fake",
            max_num_seqs=num_sequences,
            max_step_tokens=_MOST_STEP_TOKENS,
            kv_cache_tokens=num_sequences * _PAGES_PER_SEQUENCE * PAGE_TOKENS,
            log_level="warning",
        )
        command = [sys.executable, "-m", "tests.bench.paced_engine", str(theirs.fileno())]
        command += [str(1000 * step_s), str(_NUM_SKIPPED)]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True) as engine:
            theirs.close()
            messages.send(ours, messages.Start(settings))
            while not isinstance(messages.receive_from_engine(ours), messages.Ready):
                pass
            wanted = requests()
            for request in itertools.islice(wanted, num_sequences):
                messages.send(ours, messages.Submit(request))
            num_taken_steps = 0
            while num_taken_steps <= num_steps + _NUM_SKIPPED:
                message = messages.receive_from_engine(ours)
                if isinstance(message, messages.Step):
                    num_taken_steps = message.stats.num_steps
                    counts: Counter[int] = Counter()
                    for event in message.tokens:
                        counts[event.handle] += len(event.token_ids)
                    messages.send(ours, messages.Sent(counts))
                    for _ in [event for event in message.tokens if event.is_request_end]:
                        messages.send(ours, messages.Submit(next(wanted)))
            _say_goodbye(ours)
            summary: dict[str, float | None] = json.loads(engine.communicate(timeout=30)[0])
            return summary


def _say_goodbye(connection: Connection) -> None:
    """Say that nothing more comes, and take what still does, so that the engine need not drop it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_WR)
    with contextlib.suppress(EOFError), connection:
        while True:
            connection.recv_bytes()


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_overlap")
    parser.add_argument("--cells", nargs="+", default=["1x1", "64x3", "256x3"], help="sequences x ms a step")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    sys.setswitchinterval(messages.SWITCH_INTERVAL_S)
    results = conditions("tests.bench.bench_overlap", sys.argv[1:] if argv is None else argv) | {"cells": []}
    for name in arguments.cells:
        num_sequences, step_ms = int(name.partition("x")[0]), float(name.partition("x")[2])
        about = {"sequences": num_sequences, "device_ms": step_ms}
        loop = Loop(num_sequences, step_ms / 1000, arguments.steps).run(is_profiled=arguments.profile)
        results["cells"].append(about | {"runs": "the loop alone"} | loop)
        if not arguments.profile:
            process = run_process(num_sequences, step_ms / 1000, arguments.steps)
            results["cells"].append(about | {"runs": "the engine's process"} | process)
    print(overlap_table(results))
    if not arguments.no_results and not arguments.profile:
        write_results("overlap", results)


if __name__ == "__main__":
    main()
