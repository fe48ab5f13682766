"""Load generators as processes of their own, and the reports that they print."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.bench.conditions import PROJECT


def run_load(module: str, arguments: Sequence[object], seconds: float) -> dict[str, Any]:
    """The report of a module that loads for so long; RuntimeError when it, or a request, failed."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=seconds + 120, check=False)
    if not done.stdout:
        raise RuntimeError(done.stderr.decode())
    return read_report(done.stdout)


def read_report(line: str | bytes) -> dict[str, Any]:
    """A report out of its JSON; RuntimeError when a request failed."""
    report: dict[str, Any] = json.loads(line)
    if report["errors"]:
        raise RuntimeError(f"requests failed: {report['errors']}")
    return report


def client_load(
    url: str, num_streams: int, seconds: float, prompt_tokens: int, max_tokens: int, *more: object
) -> dict[str, Any]:
    """`client.load` over gRPC with so many requests at a time; `more`: further arguments of its command line."""
    arguments = ["--json", "--quiet", "--url", url, "--streams", num_streams, "--requests", 10_000_000]
    arguments += ["--max-seconds", seconds, "--prompt-tokens", prompt_tokens, "--max-tokens", max_tokens]
    return run_load("client.load", [*arguments, *more], seconds)
