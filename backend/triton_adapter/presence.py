"""Files by which the models tell the supervisor which processes they are and whether the engine serves.

The supervisor (backend/serve.py) names the folder in NEMO_RUN_DIR; without a supervisor nothing is written. Triton's own
readiness cannot say that a stub was killed (server 2.51 keeps answering 200), so the supervisor watches the process ids.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

RUN_DIR_VARIABLE = "NEMO_RUN_DIR"
RESTARTS_FILE = "engine_restarts"


def announce(name: str, *, pid: int | None = None, failure: str = "") -> None:
    """Write `<name>.json` with a process id (default: this process) and, once it does not serve any more, why."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    if not folder:
        return
    path = Path(folder, f"{name}.json")
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps({"name": name, "pid": pid or os.getpid(), "failure": failure}))
    aside.rename(path)


def withdraw(name: str, *, pid: int | None = None) -> None:
    """Remove the file: the process (default: this one) ends because it was asked to.

    When a model is loaded anew its old process ends last: then the file is its successor's, and stays.
    """
    folder = os.environ.get(RUN_DIR_VARIABLE)
    if not folder:
        return
    path = Path(folder, f"{name}.json")
    if path.exists() and json.loads(path.read_text())["pid"] == (pid or os.getpid()):
        path.unlink(missing_ok=True)


def num_restarts() -> int:
    """How often the supervisor restarted the engine of this server so far."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    path = Path(folder, RESTARTS_FILE) if folder else None
    return int(path.read_text()) if path is not None and path.exists() else 0
