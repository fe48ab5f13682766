"""Where, when and from which commit a number was taken, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")


def conditions(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Of a measurement that begins now with `python -m module arguments`, by `chrt` when nothing else may interrupt it."""
    is_first = os.sched_getscheduler(0) == os.SCHED_FIFO
    by = [f"chrt --fifo {os.sched_getparam(0).sched_priority}"] if is_first else []
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "machine": f"{processor}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "command": " ".join([*by, "python -m", module, *arguments]),
    }


def _commit() -> str:
    """ "unknown" where there is no git, or no repository, as on a machine that got the files alone."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(name: str, content: dict[str, Any]) -> None:
    """Keep `content` as results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def read_results(name: str) -> dict[str, Any]:
    """What was kept last."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content
