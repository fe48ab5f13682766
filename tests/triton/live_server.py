"""A whole server as an operator starts it: the real supervisor in a session of its own, on free ports, watched from outside.

Every process of the server inherits a mark in its environment, and its temporary files go to a folder of its own: so what is left
behind is found by looking at the machine, not by asking the server.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

PROJECT = Path(__file__).resolve().parents[2]
STUBS = ("preprocessing", "mistral_nemo", "postprocessing")
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
_MARK = "LIVE_TEST_MARK"
_POLL_S = 0.05
T = TypeVar("T")

# Runs a command in the foreground of a new terminal, types there what comes on standard input, and ends as the command does.
_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class LiveServer:
    """One supervisor and everything below it. `start` returns at once; `wait_until_ready` when it serves."""

    def __init__(
        self, checkpoint: Path, folder: Path, *, grace_s: float = 30.0, has_gateway: bool = False, **settings: str
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.log_path = folder / "log.txt"
        self.http_port, self.grpc_port, self.metrics_port, openai_port = free_ports(4)
        self.openai_port = openai_port if has_gateway else 0
        self.grpc_url = f"127.0.0.1:{self.grpc_port}"
        self.http_url = f"127.0.0.1:{self.http_port}"
        self._temporary = folder / "temporary"
        self._temporary.mkdir()
        self._supervisors: set[int] = set()
        self._mark = uuid.uuid4().hex
        self._command = serve_command(
            "--checkpoint", str(checkpoint), "--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port),
            "--metrics-port", str(self.metrics_port), "--openai-port", str(self.openai_port),
            "--grace-s", str(grace_s), "--question", "",
        )  # fmt: skip
        # One thread: two on two cores that others use too wait for each other and are many times slower.
        variables = {"NEMO_NUM_THREADS": "1"} | {f"NEMO_{name.upper()}": value for name, value in settings.items()}
        self.environment = server_environment() | variables | {_MARK: self._mark, "TMPDIR": str(self._temporary)}
        self.process: subprocess.Popen[bytes]

    def start(self, *, in_terminal: bool = False) -> LiveServer:
        """Start the supervisor; `in_terminal` in the foreground of a terminal of its own, whose keyboard is `process.stdin`."""
        command = [sys.executable, "-c", _TERMINAL, *self._command] if in_terminal else self._command
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=self.environment,
                stdin=subprocess.PIPE if in_terminal else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def is_gateway_ready(self) -> bool:
        """What a readiness probe of the gateway sees."""
        try:
            return http_get(self.openai_port, "/v1/health/ready")[0] == 200
        except OSError:
            return False

    def wait_until_gateway_ready(self, timeout_s: float = 60.0) -> None:
        """Wait for the gateway, which becomes ready after the server."""
        wait_until(self.is_gateway_ready, timeout_s, self.log)

    def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> LiveServer:
        """Return once the ensemble serves."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"the supervisor ended with {self.process.returncode}:\n{self.log()}"
            return self.is_ready()

        wait_until(is_ready, timeout_s, lambda: f"not ready:\n{self.log()}")
        assert self.shared_memory(), "a running server has shared memory, else nothing says that none is left of it"
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Signal the supervisor and check that it ends as it promises: status 0, and nothing left of it."""
        self.process.send_signal(number)
        self.assert_ended(0)

    def assert_ended(self, status: int, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """The supervisor ends by itself with `status`, and no process, shared memory or file stays."""
        assert self.process.wait(timeout=timeout_s) == status, self.log()
        self.assert_nothing_left()

    def assert_nothing_left(self, timeout_s: float = 0.0) -> None:
        """No process, no shared memory and no run folder of this server (within `timeout_s`)."""
        wait_until(lambda: not self.left_over(), timeout_s, lambda: f"left over: {self.left_over()}\n{self.log()}")

    def left_over(self) -> list[str]:
        """Whatever of this server is still on the machine."""
        processes = [f"process {pid} {command_line(pid)}" for pid in self.pids()]
        return [*processes, *map(str, self.shared_memory()), *map(str, self.run_folders())]

    def kill_everything(self) -> None:
        """Leave nothing on the machine, whatever state the test left the server in."""
        for pid in self.pids():
            kill(pid, signal.SIGKILL)
        if hasattr(self, "process"):
            self.process.wait(timeout=STOP_TIMEOUT_S)
            if self.process.stdin is not None:
                self.process.stdin.close()
        for region in self.shared_memory():
            region.unlink(missing_ok=True)

    def is_ready(self, model: str = "ensemble") -> bool:
        """What a readiness probe sees."""
        try:
            return http_get(self.http_port, f"/v2/models/{model}/ready")[0] == 200
        except OSError:
            return False

    def pids(self) -> list[int]:
        """All processes that carry this server's mark, zombies left out."""
        mark = f"{_MARK}={self._mark}".encode()
        return [pid for pid in all_pids() if mark in read_environment(pid)]

    def run_folders(self) -> list[Path]:
        """What the server has among the temporary files."""
        return list(self._temporary.iterdir())

    def shared_memory(self) -> list[Path]:
        """Regions of the stubs; they bear the supervisor's id."""
        self._supervisors |= {pid for pid in self.pids() if "-m backend.serve" in command_line(pid)}
        return [region for pid in self._supervisors for region in Path("/dev/shm").glob(f"nemo_{pid}_*")]

    def pid_of(self, name: str) -> int:
        """Process id of the engine or of a stub, as it announced itself, or of tritonserver."""
        if name == "tritonserver":
            found = [pid for pid in self.pids() if command_line(pid).split(" ")[0].endswith("bin/tritonserver")]
            assert len(found) == 1, f"{len(found)} processes are a tritonserver"
            return found[0]
        (folder,) = self.run_folders()
        return int(json.loads((folder / f"{name}.json").read_text())["pid"])

    def log(self) -> str:
        """Everything the supervisor, the server, the stubs and the engine said."""
        return self.log_path.read_text(errors="replace")


def serve_command(*arguments: str) -> list[str]:
    """The command behind `make serve`."""
    return [sys.executable, "-m", "backend.serve", *arguments]


def server_environment() -> dict[str, str]:
    """This process's environment without what its caller may have set for a server of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NEMO_")}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def http_get(port: int, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body; OSError when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error
    finally:
        connection.close()


def wait_until(condition: Callable[[], T], timeout_s: float, problem: Callable[[], str] | str) -> T:
    """Poll until `condition()` is true and return what it said; AssertionError with `problem` after `timeout_s`."""
    end_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end_s:
            raise AssertionError(f"after {timeout_s:g} s: {problem if isinstance(problem, str) else problem()}")
        time.sleep(_POLL_S)
    return value


def all_pids() -> Iterable[int]:
    """Every process there is."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def read_environment(pid: int) -> bytes:
    """The environment a process was started with; empty for one that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def command_line(pid: int) -> str:
    """How a process was started; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def kill(pid: int, number: int) -> None:
    """Signal a process that may have ended meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
