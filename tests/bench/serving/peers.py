"""What others serve the same model with, each in a process of its own, which is ended when it takes too long."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.peers.processes import PeerProcess

PEERS = ("vLLM", "PyTorch, static batch", "transformers")
"""In the order in which they are measured."""
_SHOWN_LOG_CHARACTERS = 300


def run_peer(name: str, job: dict[str, Any], folder: Path, timeout_s: float) -> Iterator[dict[str, Any]]:
    """What `peer_process.py` says of one peer: cells without their `way`, or one {"missing": why}."""
    log_path = folder / f"{name.partition(',')[0]}.txt"
    command = [sys.executable, "-m", "tests.bench.serving.peer_process", name, json.dumps(job)]
    process = PeerProcess(command, log_path, is_read=True)
    timer = threading.Timer(timeout_s, process.end)
    timer.start()
    try:
        assert process.process.stdout is not None
        for line in process.process.stdout:
            yield json.loads(line)
        if (status := process.process.wait()) != 0:
            said = log_path.read_text(errors="replace")[-_SHOWN_LOG_CHARACTERS:]
            yield {"missing": f"ended with status {status} (after {timeout_s:.0f} s it is ended): {said}"}
    finally:
        timer.cancel()
        timer.join()
        process.end()
