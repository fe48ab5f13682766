"""What a kubelet does with the container of a pod, by its manifest: environment, probes, preStop, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.deploy.helm import environment
from tests.deploy.manifests import Manifest
from tests.triton.live_server import LiveServer, http_get, kill


class Probe:
    """One of a container's probes, asked with its own period, timeout and threshold, in a thread."""

    def __init__(self, definition: dict[str, Any], ports: dict[str, int]) -> None:
        self._definition = definition
        self._port = ports[definition["httpGet"]["port"]]
        self._is_over = threading.Event()
        self._num_failures = 0
        self.num_asked = 0
        self.succeeded = threading.Event()
        self.is_failing = threading.Event()
        self._thread = threading.Thread(target=self._ask_forever)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _ask_forever(self) -> None:
        if self._is_over.wait(self._definition["initialDelaySeconds"]):
            return
        while True:
            self.num_asked += 1
            if self._ask():
                self._num_failures = 0
                self.succeeded.set()
                self.is_failing.clear()
            else:
                self._num_failures += 1
                if self._num_failures >= self._definition["failureThreshold"]:
                    self.is_failing.set()
                    self.succeeded.clear()
            if self._is_over.wait(self._definition["periodSeconds"]):
                return

    def _ask(self) -> bool:
        try:
            path = self._definition["httpGet"]["path"]
            return http_get(self._port, path, timeout_s=self._definition["timeoutSeconds"])[0] == 200
        except OSError:
            return False


class KubeletServer(LiveServer):
    """The server's container of a workload's pod, as a process on this machine; ports are its own."""

    def __init__(self, workload: Manifest, checkpoint: Path, folder: Path) -> None:
        pod = workload["spec"]["template"]["spec"]
        (self.container,) = pod["containers"]
        self.grace_period_s = pod["terminationGracePeriodSeconds"]
        super().__init__(checkpoint, folder, has_gateway=True)
        self._command = [sys.executable, "-m", "backend.container", *self.container["args"]]
        ports = {
            "HTTP_PORT": self.http_port,
            "GRPC_PORT": self.grpc_port,
            "METRICS_PORT": self.metrics_port,
            "NIM_SERVER_PORT": self.openai_port,
        }
        self.environment |= environment(self.container) | {name: str(port) for name, port in ports.items()}
        self.environment |= {"NIM_MODEL_PATH": str(checkpoint)}
        named = {"http": self.http_port, "grpc": self.grpc_port, "openai": self.openai_port}
        self.startup = Probe(self.container["startupProbe"], named)
        self.readiness = Probe(self.container["readinessProbe"], named)
        self.liveness = Probe(self.container["livenessProbe"], named)

    def start_pod(self) -> None:
        """Start the container; once its startup probe succeeds, the other two are asked."""
        self.start()
        self.startup.start()
        assert self.startup.succeeded.wait(120.0), self.log()
        self.startup.stop()
        self.readiness.start()
        self.liveness.start()
        assert self.readiness.succeeded.wait(60.0), self.log()

    def delete_pod(self) -> float:
        """preStop, SIGTERM, wait for the grace period as a whole and no longer; seconds it took.

        Probes of a terminating pod go on: a liveness probe that failed now would kill it early.
        """
        started_s = time.monotonic()
        command = self.container["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run(command, check=True, timeout=self.grace_period_s)
        kill(self.process.pid, signal.SIGTERM)
        left_s = self.grace_period_s - (time.monotonic() - started_s)
        try:
            self.process.wait(timeout=left_s)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"killed after the grace period:\n{self.log()}") from None
        return time.monotonic() - started_s

    def stop_probes(self) -> None:
        for probe in (self.startup, self.readiness, self.liveness):
            probe.stop()
