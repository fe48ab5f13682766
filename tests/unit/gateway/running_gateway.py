"""A gateway as a process of its own, in front of whatever speaks Triton's gRPC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from tests.triton.live_server import PROJECT, free_ports, wait_until

MODEL = "mistral-nemo"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class RunningGateway:
    """`python -m client.gateway` on a free port; leaving the context ends it, whatever state it is in."""

    def __init__(self, folder: Path, triton: str, *arguments: str, scheme: str = "http", **environment: str) -> None:
        (self.port,) = free_ports(1)
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.log_path = folder / f"gateway-{self.port}.log"
        self._command = [sys.executable, "-m", "client.gateway", "--port", str(self.port), "--host", "127.0.0.1"]
        self._command += ["--triton", triton, "--log-level", "debug", *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        self._environment = inherited | environment
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> RunningGateway:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=PROJECT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._is_up, START_TIMEOUT_S, self.log)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log()
        return "Uvicorn running" in self.log()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)

    def client(self, **headers: str) -> httpx2.Client:
        """A plain HTTP client of it."""
        return httpx2.Client(base_url=self.url, timeout=60.0, headers=headers)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """One request with the served model's name."""
        with self.client() as client:
            return client.post(path, json={"model": MODEL} | body)

    def chat(self, content: str = "Hi", **body: Any) -> httpx2.Response:
        """One chat of one message."""
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)

    def log(self) -> str:
        """Everything it said."""
        return self.log_path.read_text(errors="replace")

    def lines_of(self, request_id: str) -> list[dict[str, Any]]:
        """The log lines of a request; all lines are JSON."""
        whole = self.log().rpartition("\n")[0]
        return [line for line in map(json.loads, whole.splitlines()) if line.get("request_id") == request_id]


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", response.text
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
