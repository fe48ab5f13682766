"""Owns an engine until it is killed: `python -m tests.engine.owner CHECKPOINT` prints the engine's process id."""

from __future__ import annotations

import sys
import time

from backend.engine.engine_process import EngineProcess
from backend.settings import Settings

if __name__ == "__main__":
    process = EngineProcess(Settings(checkpoint=sys.argv[1], runner="fake"), lambda _: None, lambda _: None)
    process.start(lambda _: None)
    print(process.pid, flush=True)
    time.sleep(600)
