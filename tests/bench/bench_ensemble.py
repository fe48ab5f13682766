"""What the whole Triton path lets through: client, ensemble and responses around an engine that costs nothing.

    python -m tests.bench.bench_ensemble [--seconds 10] [--streams 1 16 64 256]

Starts a real server with the setting `runner` = `fake`, once with responses that carry whatever has come (the default) and once
with a token each (`max_tokens_per_response` = 1), and loads it with `client.load`, which takes part of the same cores. Prints a
Markdown table and writes results/ensemble.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.conditions import machine_and_commit
from tests.checkpoints import make_checkpoint
from tests.triton.live_server import PROJECT, LiveServer
from tests.triton.metrics import wait_until_idle

RESULTS = Path(__file__).with_name("results") / "ensemble.json"
_PROMPT_TOKENS = 64
_MAX_TOKENS = 512
_SETTINGS: dict[str, Any] = {"runner": "fake", "kv_cache_tokens": str(2**20)}
_COLUMNS = {
    "tokens_per_s": "tokens/s",
    "responses_per_s": "responses/s",
    "tokens_per_response": "tokens/response",
    "first_token_p50_ms": "first token p50, ms",
    "first_token_p99_ms": "p99",
    "gap_p50_ms": "gap p50, ms",
    "gap_p99_ms": "p99",
}


def measure(server: LiveServer, num_streams: int, seconds: float) -> dict[str, Any]:
    """One cell: `client.load`'s report after `seconds` with `num_streams` requests at a time; RuntimeError if one failed."""
    command = [sys.executable, "-m", "client.load", "--json", "--quiet", "--url", server.grpc_url]
    command += ["--streams", str(num_streams), "--requests", "1000000", "--max-seconds", str(seconds)]
    command += ["--prompt-tokens", str(_PROMPT_TOKENS), "--max-tokens", str(_MAX_TOKENS)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=seconds + 60, check=False)
    if not done.stdout:
        raise RuntimeError(done.stderr.decode())
    report: dict[str, Any] = json.loads(done.stdout)
    if report["errors"]:
        raise RuntimeError(f"requests failed: {report['errors']}")
    return report


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
                    print(row(cells[-1]), file=sys.stderr, flush=True)
                server.stop()
            finally:
                server.kill_everything()
    return cells


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    kind = "one token" if cell["max_tokens_per_response"] else "what has come"
    values = [cell[name] for name in _COLUMNS]
    numbers = ["none" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values]
    return f"| {kind} | {cell['streams']} | " + " | ".join(numbers) + " |"


def conditions(command: str, seconds: float) -> dict[str, Any]:
    """Where and how the numbers were taken."""
    return machine_and_commit() | {
        "command": command,
        "seconds_per_cell": seconds,
        "prompt_tokens": _PROMPT_TOKENS,
        "max_tokens": _MAX_TOKENS,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_ensemble", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256], help="requests at a time")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions(" ".join(["python -m tests.bench.bench_ensemble", *(argv or sys.argv[1:])]), arguments.seconds)
    cells = measure_all(arguments.streams, arguments.seconds)
    print("| a response carries | streams | " + " | ".join(_COLUMNS.values()) + " |")
    print("|---|" + "---:|" * (len(_COLUMNS) + 1))
    print("\n".join(map(row, cells)))
    print(
        f"\n{about['machine']}, load {about['load_average_before']} before; commit {about['commit']}; `{about['command']}`"
    )
    if not arguments.no_results:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(about | {"cells": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
