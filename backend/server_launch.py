"""Starts tritonserver so that nothing outlives it, not even when its supervisor is killed with SIGKILL.

    python server_launch.py SUPERVISOR_PID RUN_FOLDER SHARED_MEMORY_PREFIX tritonserver OPTIONS...

The process becomes tritonserver, which the kernel kills with the supervisor. Before that it leaves a guard: a process that waits
until tritonserver is gone, then ends the stubs and the engine and removes their files and shared memory.

NOTE: a stub of server 2.51 cannot be trusted to end itself, and no thread of Python in it can see to that: until the server
took its last answers, it waits in C++ and keeps the interpreter's lock. Nor can a parent-death signal: the thread of the server
that forks a stub may end long before the server does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path

RUN_DIR_VARIABLE = "NEMO_RUN_DIR"  # every process below tritonserver inherits it; read by triton_adapter/presence.py
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_WATCH_PERIOD_S = 0.2


def command_line(run_folder: Path, shared_memory_prefix: str, command: list[str]) -> list[str]:
    """How this process, the supervisor, starts `command`; RUN_DIR_VARIABLE must be `run_folder` in its environment."""
    launch = [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid())]
    return [*launch, str(run_folder), shared_memory_prefix, *command]


def remove_leftovers(run_folder: Path, shared_memory_prefix: str) -> None:
    """End every process that carries the run folder in its environment, except this one; remove their files and memory."""
    mark = f"\0{RUN_DIR_VARIABLE}={run_folder}\0".encode()
    while left := [pid for pid in _other_processes() if mark in b"\0" + _environment(pid)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    for region in Path("/dev/shm").glob(f"{shared_memory_prefix}*"):
        region.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # the guard and the supervisor may both come to this
        shutil.rmtree(run_folder)


def _other_processes() -> list[int]:
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and int(entry.name) != os.getpid()
    ]


def _environment(pid: int) -> bytes:
    """The environment a process was started with; empty for a zombie, and for one that is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _guard(server: int, run_folder: Path, shared_memory_prefix: str) -> None:
    """Wait for the end of the parent process `server`, then remove what is left of it."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever signals the whole group means the server, which may drain first
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    while os.getppid() == server:
        time.sleep(_WATCH_PERIOD_S)
    remove_leftovers(run_folder, shared_memory_prefix)


def main() -> None:
    """Leave the guard, become the server."""
    supervisor, run_folder, shared_memory_prefix, *command = sys.argv[1:]
    server = os.getpid()
    if os.fork() == 0:
        try:
            _guard(server, Path(run_folder), shared_memory_prefix)
        finally:
            os._exit(0)
    # SIGKILL, since on SIGTERM the server would wait for its running streams.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(supervisor):
        os._exit(1)  # it was killed before
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
