"""The engine's process, all threads of it, on a device that only sleeps.

    python -m tests.bench.paced_engine SOCKET STEP_MS SKIPPED

When its owner closes the connection, it prints what the device waited (paced_runner.py) as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from backend.checkpoint.vocabulary import read_vocabulary
from backend.engine import process
from backend.engine.plan import PAGE_TOKENS
from backend.runner.select import Progress, ServedModel
from backend.settings import Settings
from tests.bench.paced_runner import PacedRunner


def main(file_descriptor: int, step_ms: float, num_skipped: int) -> int:
    """Serve the owner at the other end of the socket, then report."""
    runners: list[PacedRunner] = []

    def make_runner(settings: Settings, _: Progress) -> ServedModel:
        num_pages = settings.kv_cache_tokens // PAGE_TOKENS
        runners.append(PacedRunner(num_pages=num_pages, max_num_seqs=settings.max_num_seqs, step_time_s=step_ms / 1000))
        vocab_size = read_vocabulary(Path(settings.checkpoint)).vocab_size
        return ServedModel(runners[0], vocab_size, num_pages * PAGE_TOKENS, 10.0, False, {})

    with patch.object(process, "make_runner", make_runner):
        status = process.main(file_descriptor)
    print(json.dumps(runners[0].summary(num_skipped)), flush=True)
    return status


if __name__ == "__main__":
    status = main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    os._exit(status)  # as the engine's process does: its other threads have nothing left to say
