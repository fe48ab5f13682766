"""Processes of a peer: started with a mark in their environment, found by it, weighed, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.triton.live_server import all_pids, kill, read_environment, server_environment

_MARK = "BENCH_PEER_MARK"


def memory_mb(pids: Iterable[int]) -> float:
    """Memory of all processes together in megabytes (10^6 bytes); what several share is counted once (Pss of smaps_rollup)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


class PeerProcess:
    """A command and everything below it, in a session of its own; what it says goes to `log_path`, but for its standard
    output when `is_read`.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        is_read: bool = False,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.log_path = log_path
        variables = server_environment() if environment is None else dict(environment)
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=variables | {_MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_read else log,
                stderr=log,
                start_new_session=True,
            )

    def read_line(self) -> str:
        """The next line of standard output; RuntimeError with the log when it ended instead."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args!r} ended:\n{self.log_path.read_text(errors='replace')[-4000:]}")
        return line.decode().strip()

    def pids(self) -> list[int]:
        """Everything that carries the mark."""
        return [pid for pid in all_pids() if f"{_MARK}={self._mark}".encode() in read_environment(pid)]

    def end(self, timeout_s: float = 15.0) -> None:
        """SIGTERM, and SIGKILL for what is left."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"{self.process.args!r} did not end within {timeout_s:g} s", file=sys.stderr)
        for pid in self.pids():
            if pid != os.getpid():
                kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
