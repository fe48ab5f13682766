"""Thousands of mixed requests at once to a live server, each of whose answers is known: `make soak`.

    python -m tests.triton.soak [--requests 2000] [--at-once 48] [--seed 0] [--max-seconds 1800]
    python -m tests.triton.soak --minutes 30

Every distinct request is answered alone first. Then come thousands of them together, over every protocol, streamed and not, some
taken back, some with deadlines, some bad. Whatever came of an answer must be what came alone, in its order, once; and in the end
the metrics account for every request, and every page is back. The same is done with a pool so small that preemption is constant.

With `--minutes` one server is kept busy for so long, and what its processes hold is watched (long_soak.py).
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.conditions import conditions, write_results
from tests.bench.tables import soak_table
from tests.checkpoints import make_checkpoint
from tests.triton.live_server import LiveServer
from tests.triton.long_soak import long_soak
from tests.triton.soak_call import Truth
from tests.triton.soak_run import SoakReport, make_calls, make_truths, soak

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_size": 256,
    "vocab_size": 4096,
    "has_tekken": True,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 64,
}
ROOMY: dict[str, Any] = {"kv_swap_ratio": "0"}
TIGHT: dict[str, Any] = {
    "kv_cache_tokens": "384",
    "kv_swap_ratio": "16",
    "max_num_seqs": "16",
    "max_step_tokens": "128",
}
"""A pool of 6 pages, for 16 sequences of up to 6."""
SERVERS = {"roomy": ROOMY, "tight": TIGHT}


def run(
    folder: Path, seed: int, num_requests: int, at_once: int, max_seconds: float, recordings: Path | None
) -> list[SoakReport]:
    """Both soaks, on servers of their own, which must end as they promise; their engines write `recordings`."""
    checkpoint = make_checkpoint(folder / "checkpoint", **SIZES)
    truths: list[Truth] = []
    reports = []
    for name, settings in SERVERS.items():
        more: dict[str, Any] = {} if recordings is None else {"recording": str(recordings)}
        server = LiveServer(checkpoint, folder / name, **settings, **more)
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
    parser.add_argument(
        "--minutes", type=float, help="keep one server busy for so long instead, and watch what it holds"
    )
    parser.add_argument("--recordings", type=Path, help="folder for recordings of the engines (setting `recording`)")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server stays
    results = conditions("tests.triton.soak", sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.minutes is not None:
            checkpoint = make_checkpoint(Path(folder, "checkpoint"), **SIZES)
            report = long_soak(checkpoint, Path(folder), arguments.seed, arguments.at_once, 60.0 * arguments.minutes)
            print(report)
            if not arguments.no_results:
                write_results("long_soak", results | report.numbers())
            return 1 if report.problems else 0
        reports = run(
            Path(folder),
            arguments.seed,
            arguments.requests,
            arguments.at_once,
            arguments.max_seconds,
            arguments.recordings,
        )
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
