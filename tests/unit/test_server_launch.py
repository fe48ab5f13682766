"""The guard beside tritonserver, with another program in its place: whatever dies first, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.triton.live_server import PROJECT, all_pids, command_line, kill, read_environment, wait_until

TIMEOUT_S = 20.0
PREFIX = f"nemo_test_{uuid.uuid4().hex[:12]}_"
# A supervisor that starts "tritonserver": a shell with a child, the stub, that ends for nothing but SIGKILL.
SUPERVISOR = """
    import os, subprocess, sys, time
    project, run_folder, prefix, *other_pid = sys.argv[1:]
    sys.path.insert(0, project)
    from backend.server_launch import RUN_DIR_VARIABLE, command_line
    server = ["/bin/sh", "-c", "(trap '' HUP INT TERM; while :; do sleep 1000; done) & echo started; wait"]
    command = command_line(run_folder, prefix, server)
    command[3:4] = other_pid or command[3:4]
    environment = os.environ | {RUN_DIR_VARIABLE: run_folder}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        print(process.stdout.readline().strip(), process.pid, flush=True)
        process.wait()
        print("ended", flush=True)
        time.sleep(1000)
"""


class Launched:
    """A supervisor, its server, and what is left of them."""

    def __init__(self, folder: Path, *other_pid: str) -> None:
        self.run_folder = folder / "run"
        self.run_folder.mkdir()
        (self.run_folder / "postprocessing.json").write_text("{}")
        self.memory = Path("/dev/shm", f"{PREFIX}0")
        self.memory.write_text("")
        code = textwrap.dedent(SUPERVISOR)
        command = [sys.executable, "-c", code, str(PROJECT), str(self.run_folder), PREFIX, *other_pid]
        self.supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait_until_started(self) -> int:
        """The server's process id."""
        assert self.supervisor.stdout is not None
        started, _, pid = self.supervisor.stdout.readline().strip().partition(" ")
        assert started == "started"
        wait_until(lambda: len(self.pids()) >= 3, TIMEOUT_S, lambda: f"only {self.command_lines()}")
        return int(pid)

    def pids(self) -> list[int]:
        mark = f"NEMO_RUN_DIR={self.run_folder}".encode()
        return [pid for pid in all_pids() if mark in read_environment(pid)]

    def command_lines(self) -> list[str]:
        return [command_line(pid) for pid in self.pids()]

    def guard(self) -> int:
        (pid,) = [pid for pid in self.pids() if "server_launch.py" in command_line(pid)]
        return pid

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.pids(), TIMEOUT_S, lambda: f"alive: {self.command_lines()}")
        wait_until(lambda: not self.run_folder.exists(), TIMEOUT_S, "the run folder stays")
        assert not self.memory.exists()

    def end(self) -> None:
        for pid in [self.supervisor.pid, *self.pids()]:
            kill(pid, signal.SIGKILL)
        self.supervisor.wait()
        assert self.supervisor.stdout is not None
        self.supervisor.stdout.close()
        self.memory.unlink(missing_ok=True)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    try:
        yield launched
    finally:
        launched.end()


def test_a_server_that_is_killed_leaves_nothing(launched: Launched) -> None:
    os.kill(launched.wait_until_started(), signal.SIGKILL)
    launched.assert_nothing_left()
    assert launched.supervisor.poll() is None


def test_a_supervisor_that_is_killed_leaves_nothing(launched: Launched) -> None:
    launched.wait_until_started()
    launched.supervisor.kill()
    launched.assert_nothing_left()


def test_the_guard_stays_when_its_group_is_told_to_end(launched: Launched) -> None:
    server = launched.wait_until_started()
    guard = launched.guard()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(guard, number)
    time.sleep(1.0)
    assert launched.guard() == guard
    os.killpg(server, signal.SIGTERM)
    launched.assert_nothing_left()


def test_a_server_without_its_supervisor_does_not_start(tmp_path: Path) -> None:
    """The supervisor was killed before its server could ask to be killed with it: then its pid is not the parent's."""
    launched = Launched(tmp_path, str(os.getpid()))
    try:
        launched.assert_nothing_left()
        assert launched.supervisor.stdout is not None
        assert not launched.supervisor.stdout.readline().startswith("started")
    finally:
        launched.end()
