"""Any process of the server may be killed at any moment: clients are told at once, and it serves again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from tests.triton.calls import ask
from tests.triton.conftest import StartServer
from tests.triton.live_server import STUBS, LiveServer, command_line, kill, wait_until
from tests.triton.metrics import wait_until_idle
from tests.triton.running import running

AGAIN_TIMEOUT_S = 90.0
NOTICED_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def mortal(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LiveServer]:
    """A server that the tests of this file kill parts of, one after the other (five times are allowed within a minute)."""
    server = LiveServer(checkpoint, tmp_path_factory.mktemp("mortal") / "server")
    try:
        yield server.start().wait_until_ready()
        server.stop()
    finally:
        server.kill_everything()


def serves_as_before(server: LiveServer) -> None:
    """Ready, and the same answer as ever (`greedy` is remembered on the server object of the module)."""
    wait_until(server.is_ready, AGAIN_TIMEOUT_S, lambda: f"not ready again:\n{server.log()}")
    assert len(ask(server, text_input="Hello", max_tokens=5).ids()) == 5
    wait_until_idle(server)


def test_killed_engine(mortal: LiveServer) -> None:
    serves_as_before(mortal)
    expected = ask(mortal, text_input="Hello", max_tokens=30).summary()
    engine, stub = mortal.pid_of("engine"), mortal.pid_of("mistral_nemo")
    with running(mortal, max_tokens=3000) as answers:
        os.kill(engine, signal.SIGKILL)
        wait_until(lambda: not mortal.is_ready(), NOTICED_TIMEOUT_S, "still ready")
        done = wait(answers, timeout=NOTICED_TIMEOUT_S).done
        assert len(done) == len(answers), "a request was not answered"
        for each in answers:
            assert "the engine ended, killed by signal 9 (Killed); it is being restarted" in str(each.exception())
    serves_as_before(mortal)
    assert ask(mortal, text_input="Hello", max_tokens=30).summary() == expected
    assert mortal.pid_of("engine") != engine
    assert mortal.pid_of("mistral_nemo") != stub
    assert not {engine, stub} & set(mortal.pids())


@pytest.mark.parametrize("name", [*STUBS, "tritonserver"])
def test_killed_part(mortal: LiveServer, name: str) -> None:
    serves_as_before(mortal)
    old = {part: mortal.pid_of(part) for part in (*STUBS, "engine", "tritonserver")}
    old_memory = mortal.shared_memory()
    with running(mortal, max_tokens=3000) as answers:
        os.kill(old[name], signal.SIGKILL)
        done = wait(answers, timeout=NOTICED_TIMEOUT_S).done
        assert len(done) == len(answers), "a request was not answered"
        assert all(each.exception() is not None for each in answers)
        assert not mortal.is_ready()
    serves_as_before(mortal)
    assert not set(old.values()) & set(mortal.pids()), "a part of the old server lives on"
    assert not set(old_memory) & set(mortal.shared_memory())
    assert len(mortal.run_folders()) == 1


@pytest.mark.parametrize("stopped", [(), STUBS], ids=["", "beside stubs that cannot end themselves"])
def test_killed_supervisor_takes_everything_along(start_server: StartServer, stopped: tuple[str, ...]) -> None:
    server = start_server()
    with running(server, max_tokens=3000) as answers:
        for stub in [server.pid_of(name) for name in stopped]:
            os.kill(stub, signal.SIGSTOP)
        server.process.kill()
        assert server.process.wait(timeout=NOTICED_TIMEOUT_S) == -signal.SIGKILL
        server.assert_nothing_left(NOTICED_TIMEOUT_S)
        assert len(wait(answers, timeout=NOTICED_TIMEOUT_S).done) == len(answers), "a request was not answered"


def test_supervisor_gives_up_when_the_engine_dies_again_and_again(start_server: StartServer) -> None:
    server = start_server(runner="fake")
    killed: set[int] = set()
    while server.process.poll() is None:
        engines = {pid for pid in server.pids() if "backend.engine.process" in command_line(pid)} - killed
        if server.is_ready():
            for pid in engines:
                kill(pid, signal.SIGKILL)
            killed |= engines
        time.sleep(0.02)
    server.assert_ended(1)
    assert len(killed) == 6
    assert "given up after 5 restarts in a row" in server.log()
