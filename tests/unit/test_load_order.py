"""A load is asked for when the server has begun with the one before, not earlier; and all of them run at the same time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backend.errors import ConfigError
from backend.serve import Supervisor
from backend.server_api import ServerApi
from backend.server_process import STUBS

BEGINS_AFTER_S = 0.1


class Repository(ThreadingHTTPServer):
    """Begins with a load a moment after it was asked for; loads end when all have begun."""

    daemon_threads = True

    def __init__(self, refused: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.states: dict[str, str] = {}
        self.asked_with: list[dict[str, str]] = []
        self.together = threading.Barrier(len(STUBS), timeout=30)
        self.refused = refused


class Handler(BaseHTTPRequestHandler):
    server: Repository

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        repository, parts = self.server, self.path.split("/")
        if parts[-1] == "index":
            return self._answer(200, [{"name": name, "state": state} for name, state in repository.states.items()])
        model = parts[-2]
        repository.asked_with.append(dict(repository.states))
        if model == repository.refused:
            return self._answer(400, {"error": "ConfigError: it is not there"})
        time.sleep(BEGINS_AFTER_S)
        repository.states[model] = "LOADING"
        if not repository.refused:
            repository.together.wait()
        repository.states[model] = "READY"
        return self._answer(200, {})

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def supervisor_of(repository: Repository) -> Supervisor:
    made = Supervisor.__new__(Supervisor)
    api = ServerApi(repository.server_port, 0, "secret")
    made._server = cast(Any, SimpleNamespace(api=api, kill=lambda: None))
    made._gateway, made._num_stop_signals = None, 0
    return made


@pytest.fixture
def serve() -> Iterator[Any]:
    running: list[Repository] = []

    def start(refused: str = "") -> Repository:
        repository = Repository(refused)
        running.append(repository)
        threading.Thread(target=repository.serve_forever, daemon=True).start()
        return repository

    yield start
    for repository in running:
        repository.shutdown()
        repository.server_close()


def test_each_load_waits_for_the_beginning_of_the_one_before_and_not_for_its_end(serve: Any) -> None:
    repository = serve()
    supervisor_of(repository)._load_together(STUBS)
    for index, states in enumerate(repository.asked_with):
        assert states == dict.fromkeys(STUBS[:index], "LOADING")
    assert repository.states == dict.fromkeys(STUBS, "READY")


@pytest.mark.parametrize("refused", STUBS)
def test_a_model_that_is_refused_ends_it(serve: Any, refused: str) -> None:
    with pytest.raises(ConfigError, match="it is not there"):
        supervisor_of(serve(refused))._load_together(STUBS)
