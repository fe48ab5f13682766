"""The OpenAI gateway as a child of the supervisor: started, restarted when it dies, drained before the server is."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable

from backend.installation import PROJECT

log = logging.getLogger("nemo.serve")
_POLL_S = 0.05
_END_AFTER_S = 5.0
_RESTART_AFTER_S = 1.0

# As the server it does not outlive the supervisor (1 is PR_SET_PDEATHSIG, 9 is SIGKILL).
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class GatewayProcess:
    """One gateway in a session of its own, so that Ctrl-C in the terminal does not reach it.

    `grace_s` bounds how long it waits for its running answers when it is drained.
    """

    def __init__(self, port: int, grpc_port: int, metrics_port: int, model_name: str, grace_s: float) -> None:
        self.port = port
        self._command = [sys.executable, "-m", "client.gateway", "--port", str(port), "--model-name", model_name]
        self._command += ["--triton", f"127.0.0.1:{grpc_port}", "--triton-metrics", f"127.0.0.1:{metrics_port}"]
        self._command += ["--grace-s", str(grace_s)]
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._restart_at_s = 0.0

    def start(self) -> None:
        """Start it; it is alive long before the models are loaded, and says that they are not ready."""
        log.info("starting the OpenAI gateway on port %d", self.port)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *self._command],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self) -> None:
        """Start it again when it has ended; not more often than once a second."""
        if self._process is None or self._process.poll() is None or time.monotonic() < self._restart_at_s:
            return
        self._restart_at_s = time.monotonic() + _RESTART_AFTER_S
        log.error("the OpenAI gateway ended with status %d; starting it anew", self._process.returncode)
        self.start()

    def drain(self, keep_waiting: Callable[[], bool]) -> None:
        """Let its running answers finish: it says "not ready" at once, and ends when nothing runs any more."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        end_s = time.monotonic() + self._grace_s + _END_AFTER_S
        while self._process.poll() is None and time.monotonic() < end_s and keep_waiting():
            time.sleep(_POLL_S)
        if self._process.poll() is None:
            self._process.terminate()  # the second signal: it does not wait any more
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_AFTER_S)
        self.kill()

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
