"""Where a number was taken: machine, load, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tests.triton.live_server import PROJECT


def machine_and_commit() -> dict[str, Any]:
    """Processor and cores, load average, commit."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{models[0].partition(': ')[2] if models else platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": round(os.getloadavg()[0], 2),
        "commit": subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip(),
    }
