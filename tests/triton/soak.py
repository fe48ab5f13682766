"""Thousands of mixed requests at once to a live server, each of whose answers is known: `make soak`.

    python -m tests.triton.soak [--requests 2000] [--at-once 48] [--seed 0] [--max-seconds 1800]

Every distinct request is answered alone first. Then come thousands of them together, over every protocol, streamed and not, some
taken back, some with deadlines, some bad. Whatever came of an answer must be what came alone, in its order, once; and in the end
the metrics account for every request, and every page is back. The same is done with a pool so small that preemption is constant.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.conditions import conditions, write_results
from tests.bench.tables import soak_table
from tests.checkpoints import make_checkpoint
from tests.triton.live_server import LiveServer
from tests.triton.metrics import read_metrics, wait_until_idle
from tests.triton.mixed_requests import mixed_request
from tests.triton.soak_call import BAD, Call, Fate, Truth, call_server, truth_of

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "ffn_size": 256, "vocab_size": 4096}
ROOMY: dict[str, Any] = {"kv_swap_ratio": "0"}
TIGHT: dict[str, Any] = {
    "kv_cache_tokens": "384",
    "kv_swap_ratio": "16",
    "max_num_seqs": "16",
    "max_step_tokens": "128",
}
"""A pool of 6 pages, for 16 sequences of up to 6."""
SERVERS = {"roomy": ROOMY, "tight": TIGHT}
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


def soak(server: LiveServer, calls: Sequence[Call], at_once: int, max_seconds: float, progress: bool) -> SoakReport:
    """Send all calls, `at_once` at a time, and hold every answer and the metrics against what must be."""
    wait_until_idle(server, _IDLE_TIMEOUT_S)
    before, started_s = read_metrics(server), time.monotonic()
    problems: list[str] = []
    fates: Counter[str] = Counter()
    num_tokens = 0
    is_over = threading.Event()

    def serve(call: Call) -> tuple[str, int]:
        if is_over.is_set():
            raise TimeoutError(f"not sent within {max_seconds:.0f} s")
        return call_server(server, call)

    with ThreadPoolExecutor(at_once) as pool:
        futures: dict[Future[tuple[str, int]], Call] = {pool.submit(serve, call): call for call in calls}
        next_s = started_s + _PROGRESS_PERIOD_S
        for number, future in enumerate(as_completed(futures), 1):
            try:
                fate, num_received = future.result()
                fates[fate] += 1
                num_tokens += num_received
            except Exception as error:  # whatever it is, it is an answer that is not right
                problems.append(f"{futures[future]}: {type(error).__name__}: {error}")
            now_s = time.monotonic()
            if now_s - started_s > max_seconds:
                is_over.set()
            if progress and now_s >= next_s:
                next_s = now_s + _PROGRESS_PERIOD_S
                done = f"{number}/{len(calls)} requests, {num_tokens} tokens, {len(problems)} problems"
                print(f"{now_s - started_s:6.0f} s  {done}", file=sys.stderr, flush=True)
    wall_s = time.monotonic() - started_s
    change: dict[str, float] = {}
    try:
        wait_until_idle(server, _IDLE_TIMEOUT_S)
        after = read_metrics(server)
        change = {name: value - before.get(name, 0.0) for name, value in after.items()}
        problems += _accounts(calls, before, after)
    except AssertionError as error:
        problems.append(str(error))
    return SoakReport(
        len(calls),
        wall_s,
        dict(sorted(fates.items())),
        num_tokens,
        int(change.get("nemo_preemptions_total", 0)),
        int(change.get("nemo_prefix_hit_tokens_total", 0)),
        tuple(problems),
    )


def _accounts(calls: Sequence[Call], before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What the metrics say that they should not, once the server is idle."""
    problems = []
    num_before, num_after = (sum(at[f"nemo_kv_pages_{name}"] for name in _PAGES) for at in (before, after))
    if after["nemo_kv_pages_used"] or num_after != num_before:
        problems.append(
            f"pages are missing: {after['nemo_kv_pages_used']:.0f} used, {num_after:.0f} of {num_before:.0f} known"
        )
    if after["nemo_engine_restarts_total"] != before["nemo_engine_restarts_total"]:
        problems.append("the engine was restarted")
    reached = [call for call in calls if not (call.fate is Fate.BAD and BAD[call.bad].is_refused_early)]
    sure = sum(call.fate is not Fate.CANCELLED_AT_ONCE for call in reached)
    answered = sum(after[name] - before[name] for name in ("request_success_total", "request_failure_total"))
    if not sure <= answered <= len(reached):
        problems.append(f"{answered:.0f} requests were answered, of {sure} to {len(reached)} that reached the engine")
    return problems


def run(folder: Path, seed: int, num_requests: int, at_once: int, max_seconds: float) -> list[SoakReport]:
    """Both soaks, on servers of their own, which must end as they promise."""
    checkpoint = make_checkpoint(
        folder / "checkpoint", has_tekken=True, num_heads=4, num_kv_heads=1, head_dim=64, **SIZES
    )
    truths: list[Truth] = []
    reports = []
    for name, settings in SERVERS.items():
        server = LiveServer(checkpoint, folder / name, **settings)
        try:
            server.start().wait_until_ready()
            if not truths:
                truths = make_truths(server, seed, max(1, num_requests // 8), progress=True)
            print(f"soak of the {name} server: {settings}", file=sys.stderr, flush=True)
            calls = make_calls(truths, seed, num_requests)
            reports.append(soak(server, calls, at_once, max_seconds, progress=True))
            print(f"{name}: {reports[-1]}", flush=True)
            server.stop()
        finally:
            server.kill_everything()
    return reports


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when anything was lost, doubled, reordered or wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.triton.soak", allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=2000, help="of each of the two soaks")
    parser.add_argument("--at-once", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-seconds", type=float, default=1800.0, help="of each; what is not sent by then is a problem"
    )
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    results = conditions("tests.triton.soak", sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        reports = run(Path(folder), arguments.seed, arguments.requests, arguments.at_once, arguments.max_seconds)
    cells = [report.numbers() for report in reports]
    results["cells"] = [{"server": name} | cell for name, cell in zip(SERVERS, cells, strict=True)]
    print(soak_table(results))
    if not arguments.no_results:
        write_results("soak", results)
    is_tight_enough = reports[-1].num_preemptions >= arguments.requests // 4
    if not is_tight_enough:
        print("the tight server preempted too rarely for this to mean anything")
    return 0 if is_tight_enough and not any(report.problems for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
