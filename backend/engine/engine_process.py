"""The owner's side of the engine process: start it, talk to it, notice when it dies."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from backend.engine import messages
from backend.engine.request import GenerationRequest
from backend.errors import ConfigError, EngineFailure
from backend.settings import Settings

log = logging.getLogger("nemo.engine")
_STOP_TIMEOUT_S = 10.0
_WATCH_PERIOD_S = 0.5
_MOST_SILENT_PERIODS = 14


class EngineProcess:
    """Starts `python -m backend.engine.process` and carries messages.

    `on_step` is called with each Step and `on_death` once, with the reason, when the process ends without being asked to;
    both in the receiving thread. `start` blocks until the engine serves.
    """

    def __init__(
        self, settings: Settings, on_step: Callable[[messages.Step], None], on_death: Callable[[str], None]
    ) -> None:
        self._on_step = on_step
        self._on_death = on_death
        self._settings = settings
        self._send_lock = threading.Lock()
        self._is_closing = False
        self._stuck = ""
        self._num_messages = 0
        self._is_over = threading.Event()
        self._connection: Connection
        self._process: subprocess.Popen[bytes]
        self._receiver: threading.Thread
        self._watchdog: threading.Thread

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def start(self, on_progress: Callable[[messages.Loading], None]) -> messages.Ready:
        """Start the process and wait until it is ready.

        Must be called in a thread that lives as long as the engine: Linux sends the parent-death signal when the *thread*
        that started a process ends. Raises ConfigError or EngineFailure with the engine's own words.
        """
        self._connection, theirs = multiprocessing.Pipe(duplex=True)
        command = [sys.executable, "-m", "backend.engine.process", str(theirs.fileno())]
        # A group of its own, which Ctrl-C in a terminal does not reach. NOTE: no session of its own: Linux shares the processor
        # out by session (autogroup), and on a busy machine the engine alone in one got a third of what it got with its owner.
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0)
        theirs.close()
        try:
            ready = self._wait_until_ready(on_progress)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            raise
        self._step_timeout_s = ready.step_timeout_s
        self._receiver = threading.Thread(target=self._receive, name="engine-receiver", daemon=True)
        self._receiver.start()
        self._watchdog = threading.Thread(target=self._watch, name="engine-watchdog", daemon=True)
        self._watchdog.start()
        return ready

    def submit(self, request: GenerationRequest) -> None:
        """Queue a validated request; EngineFailure when the engine is gone."""
        self._send(messages.Submit(request))

    def abort(self, handle: int) -> None:
        """Take back a request by handle; nothing is left to do when the engine is gone."""
        with contextlib.suppress(EngineFailure):
            self._send(messages.Abort(handle))

    def abort_request_id(self, request_id: str) -> None:
        """Take back requests by the client's id; nothing is left to do when the engine is gone."""
        with contextlib.suppress(EngineFailure):
            self._send(messages.AbortRequestId(request_id))

    def note_sent(self, counts: dict[int, int]) -> None:
        """Tell how many ids of which requests have been sent; nothing is left to do when the engine is gone."""
        with contextlib.suppress(EngineFailure):
            self._send(messages.Sent(counts))

    def close(self) -> None:
        """End the engine; what still runs is lost."""
        self._is_closing = True
        with socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate:
            # close() alone would not wake the receiving thread, nor tell the engine
            duplicate.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the engine did not end within %.0f s and is killed", _STOP_TIMEOUT_S)
            self._process.kill()
            self._process.wait()
        self._receiver.join()
        self._watchdog.join()
        self._connection.close()

    def _send(self, message: messages.ToEngine) -> None:
        try:
            with self._send_lock:
                messages.send(self._connection, message)
        except OSError as error:
            raise EngineFailure("the engine is not running; it is being restarted, try again soon") from error

    def _wait_until_ready(self, on_progress: Callable[[messages.Loading], None]) -> messages.Ready:
        try:
            messages.send(self._connection, messages.Start(self._settings))
            return self._receive_until_ready(on_progress)
        except (EOFError, OSError):
            raise EngineFailure(f"the engine ended while starting, {self._exit_status()}") from None

    def _receive_until_ready(self, on_progress: Callable[[messages.Loading], None]) -> messages.Ready:
        while True:
            message = messages.receive_from_engine(self._connection)
            if isinstance(message, messages.Loading):
                on_progress(message)
            elif isinstance(message, messages.Ready):
                return message
            elif isinstance(message, messages.Fatal):
                raise (ConfigError if message.is_config else EngineFailure)(message.message)

    def _receive(self) -> None:
        reason = ""
        try:
            while True:
                message = messages.receive_from_engine(self._connection)
                self._num_messages += 1
                if isinstance(message, messages.Step):
                    self._on_step(message)
                elif isinstance(message, messages.Alive) and message.turn_age_s > self._step_timeout_s:
                    self._kill_stuck(f"its current step takes longer than {self._step_timeout_s:.0f} s")
                elif isinstance(message, messages.Fatal):
                    reason = message.message
        except (EOFError, OSError):
            log.debug("the connection to the engine is closed")
        except Exception as error:  # a bug of ours in `on_step`: nobody listens to this engine any more
            log.exception("a message of the engine could not be taken over")
            self._process.kill()
            reason = f"{type(error).__name__}: {error}"
        self._is_over.set()
        if not self._is_closing:
            self._on_death(f"the engine ended, {reason or self._stuck or self._exit_status()}")

    def _watch(self) -> None:
        """Kill an engine that says nothing any more (it reports every second): it is stopped, or stuck as a whole.

        Periods are counted, not seconds: when this process itself was stopped for a while, the engine is not to blame.
        """
        num_silent_periods, num_messages = 0, -1
        while not self._is_over.wait(_WATCH_PERIOD_S):
            num_silent_periods = num_silent_periods + 1 if num_messages == self._num_messages else 0
            num_messages = self._num_messages
            if num_silent_periods == _MOST_SILENT_PERIODS:
                self._kill_stuck(f"it said nothing for {_MOST_SILENT_PERIODS * _WATCH_PERIOD_S:.0f} s")

    def _kill_stuck(self, reason: str) -> None:
        self._stuck = f"it was stuck and was killed: {reason}"
        log.error("the engine: %s", self._stuck)
        self._process.kill()

    def _exit_status(self) -> str:
        try:
            status = self._process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "its connection broke"
        return f"killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"
