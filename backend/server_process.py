"""One tritonserver: started, watched through the files its models leave, drained, and ended without a trace."""

from __future__ import annotations

import compileall
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backend.errors import EngineFailure
from backend.exposure import GrpcTls, new_admin_secret, restriction_options
from backend.installation import PROJECT, Installation, lay_out_backends, server_environment
from backend.logs import as_json
from backend.server_api import ServerApi
from backend.server_launch import RUN_DIR_VARIABLE, command_line, remove_leftovers
from backend.settings import Settings

log = logging.getLogger("nemo.serve")
STUBS = ("preprocessing", "mistral_nemo", "postprocessing")
_EXIT_TIMEOUT_S = 2
_KILL_AFTER_S = 15.0
_POLL_S = 0.05
_QUIET_S = 2.0

_LINES_WITHOUT_GPU = (
    b"CudaDriverHelper has not been initialized",
    b"unable to create stream for ensemble: CUDA driver",
    b"falling back to non-pinned system memory",
    b"Signal (15) received",
)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the server listens."""

    http: int
    grpc: int
    metrics: int


@dataclass(frozen=True, slots=True)
class Presence:
    """What a model or the engine said of itself (backend/triton_adapter/presence.py)."""

    pid: int
    failure: str


class ServerProcess:
    """A running tritonserver in a session of its own, so that Ctrl-C in the terminal does not reach it."""

    def __init__(
        self, installation: Installation, libpython: Path, ports: Ports, settings: Settings, tls: GrpcTls | None = None
    ) -> None:
        self.run_folder = Path(tempfile.mkdtemp(prefix="nemo-"))
        admin_secret = new_admin_secret()
        self.api = ServerApi(ports.http, ports.metrics, admin_secret)
        self._is_ended = False
        self._has_json_log = settings.log_format == "json"
        self._shared_memory_prefix = f"nemo_{os.getpid()}_{self.run_folder.name[-8:]}_"
        command = [
            str(installation.server),
            f"--model-repository={PROJECT / 'model_repository'}",
            f"--backend-directory={lay_out_backends(installation, self.run_folder)}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            "--model-control-mode=explicit",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            "--metrics-interval-ms=200",
            f"--log-info={'true' if settings.log_level == 'debug' else 'false'}",
            *restriction_options(admin_secret),
            *(tls.options() if tls is not None else []),
            *([] if _has_gpu() else ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]),
        ]
        # A stub that wrote the bytecode of its model.py would change the model's folder, and server 2.51 would take the model for
        # a new version and load it again together with the ensemble.
        compileall.compile_dir(PROJECT / "model_repository", quiet=2)
        variables = {"NEMO_CHECKPOINT": settings.checkpoint, RUN_DIR_VARIABLE: str(self.run_folder)}
        environment = server_environment(installation, libpython) | variables
        self._process = subprocess.Popen(
            command_line(self.run_folder, self._shared_memory_prefix, command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._log = threading.Thread(target=self._pass_on_lines, name="server-log", daemon=True)
        self._log.start()

    @property
    def exit_status(self) -> int | None:
        """None while the server runs."""
        return self._process.poll()

    def wait_until_live(self, keep_going: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Return once the server answers; EngineFailure when it ended or does not answer in time."""
        end_s = time.monotonic() + timeout_s
        while keep_going() and not self.api.is_live():
            if self.exit_status is not None:
                raise EngineFailure(
                    f"tritonserver ended with status {self.exit_status} while starting; see its lines above"
                )
            if time.monotonic() > end_s:
                raise EngineFailure(f"tritonserver did not answer within {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def presence(self, name: str) -> Presence | None:
        """What `name` said last, or None when it has not started or was ended on purpose."""
        try:
            said = json.loads((self.run_folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return Presence(said["pid"], said["failure"])

    def death(self) -> str | None:
        """What has ended although nobody asked it to, the server or a stub, or None."""
        if self.exit_status is not None:
            return f"tritonserver ended with status {self.exit_status}"
        for name in STUBS:
            presence = self.presence(name)
            if presence is not None and not is_alive(presence.pid):
                return f"the stub of {name} died"
        return None

    def engine_failure(self) -> str | None:
        """Why the engine does not serve any more, or None."""
        presence = self.presence("engine")
        return presence.failure or None if presence is not None else None

    def count_engine_restart(self) -> None:
        """Leave the number of restarts where the next engine's adapter reads it for its metric."""
        path = self.run_folder / "engine_restarts"
        path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))

    def drain(self, grace_s: float, keep_waiting: Callable[[], bool]) -> bool:
        """Stop taking requests, let the running ones finish for `grace_s`, then take them back; True if none was taken back.

        Unloading makes a model unready at once while its streams go on. The ensemble goes first: its requests may still be
        on their way to the models behind it. A tritonserver that is signalled before all is over would cut them off.
        """
        end_s = time.monotonic() + grace_s
        is_in_time = True
        for models in (("ensemble",), STUBS):
            for model in models:
                self.api.unload(model)
            quiet = QuietWatch(self.api)
            while not self.api.are_unloaded(models) and self.exit_status is None:
                if quiet.is_quiet():
                    log.debug("%s: held by a request that has ended; not waited for", " and ".join(models))
                    break
                if is_in_time and (time.monotonic() > end_s or not keep_waiting()):
                    is_in_time = False
                    end_s = time.monotonic() + _KILL_AFTER_S
                    self._take_everything_back()
                elif time.monotonic() > end_s:
                    return False
                time.sleep(_POLL_S)
        return is_in_time

    def _take_everything_back(self) -> None:
        engine = self.presence("engine")
        if engine is not None and not engine.failure and is_alive(engine.pid):
            os.kill(engine.pid, signal.SIGTERM)

    def end(self) -> None:
        """End the server, whatever state it is in, and remove its files and shared memory; does nothing the second time."""
        if self._is_ended:
            return
        self._is_ended = True
        if self.exit_status is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs while an idle client keeps its stream open
                self._process.wait(timeout=2 * _EXIT_TIMEOUT_S)
        remove_leftovers(self.run_folder, self._shared_memory_prefix)
        self._log.join(timeout=_EXIT_TIMEOUT_S)

    def kill(self) -> None:
        """End the server at once: it has lost a stub, so its streams hang and a polite end would wait for them."""
        if self.exit_status is None:
            self._process.kill()
            self._process.wait()
        self.end()

    def _pass_on_lines(self) -> None:
        """The server's and the models' log lines, less what only says that there is no GPU, or that it was told to end."""
        assert self._process.stdout is not None
        has_gpu = _has_gpu()
        with self._process.stdout:
            for line in self._process.stdout:
                if has_gpu or not any(part in line for part in _LINES_WITHOUT_GPU):
                    sys.stderr.buffer.write(as_json(line, time.time()) if self._has_json_log else line)
                    sys.stderr.flush()


class QuietWatch:
    """Tells when no request can be running any more, although server 2.51 says that a model is not unloaded.

    NOTE: a client that cancels its gRPC stream in the moment of the last response makes the server forget to let go of that
    request, and its model would be waited for in vain. A request that really runs is known to the engine, or shows in the
    counts of executions.
    """

    def __init__(self, api: ServerApi) -> None:
        self._api = api
        self._num_executions = -1
        self._since_s = 0.0

    def is_quiet(self) -> bool:
        """Whether for a while nothing was executed, and the engine has nothing to do."""
        now_s = time.monotonic()
        num_executions = self._api.num_executions()
        if num_executions != self._num_executions or self._api.num_engine_requests():
            self._num_executions, self._since_s = num_executions, now_s
        return now_s - self._since_s > _QUIET_S


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
