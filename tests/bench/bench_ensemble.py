"""What the whole Triton path lets through: client, ensemble and responses around an engine that costs nothing.

    python -m tests.bench.bench_ensemble [--seconds 10] [--streams 1 16 64 256]

Starts a real server with the setting `runner` = `fake`, once with responses that carry whatever has come (the default) and once
with a token each (`max_tokens_per_response` = 1), and loads it with `client.load`, which takes part of the same cores. Prints a
Markdown table and writes results/ensemble.json beside this file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.conditions import conditions, write_results
from tests.bench.load_report import client_load
from tests.bench.tables import ensemble_table
from tests.checkpoints import make_checkpoint
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_until_idle

_PROMPT_TOKENS = 64
_MAX_TOKENS = 512
_SETTINGS: dict[str, Any] = {"runner": "fake", "kv_cache_tokens": str(2**20)}


def measure(server: LiveServer, num_streams: int, seconds: float) -> dict[str, Any]:
    """One cell: `client.load`'s report after `seconds` with `num_streams` requests at a time; RuntimeError if one failed."""
    return client_load(server.grpc_url, num_streams, seconds, _PROMPT_TOKENS, _MAX_TOKENS)


def measure_all(streams: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """All cells, coalesced and not."""
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_size": 96, "vocab_size": 4096}
        checkpoint = make_checkpoint(Path(folder, "checkpoint"), has_tekken=True, **sizes)
        for max_tokens_per_response in (0, 1):
            settings = _SETTINGS | {"max_tokens_per_response": str(max_tokens_per_response)}
            server = LiveServer(checkpoint, Path(folder, f"server-{max_tokens_per_response}"), **settings)
            try:
                server.start().wait_until_ready()
                measure(server, 4, 1.0)  # warm
                for num_streams in streams:
                    wait_until_idle(server, 60.0)
                    cell = measure(server, num_streams, seconds)
                    cells.append({"max_tokens_per_response": max_tokens_per_response} | cell)
                    speed = f"{cell['tokens_per_s']:,.0f} tokens/s, gap p99 {cell['gap_p99_ms']} ms"
                    print(f"{num_streams} streams: {speed}", file=sys.stderr, flush=True)
                server.stop()
            finally:
                server.kill_everything()
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_ensemble", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256], help="requests at a time")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_ensemble", sys.argv[1:] if argv is None else argv)
    about |= {"seconds_per_cell": arguments.seconds, "prompt_tokens": _PROMPT_TOKENS, "max_tokens": _MAX_TOKENS}
    results = about | {"cells": measure_all(arguments.streams, arguments.seconds)}
    print(ensemble_table(results))
    if not arguments.no_results:
        write_results("ensemble", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
