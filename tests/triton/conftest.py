"""One server for all tests that do not harm it, and the logs of every server a failed test has seen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_until_idle

_SHOWN_LOG_CHARACTERS = 6000
_LOGGED: pytest.StashKey[list[LiveServer]] = pytest.StashKey()
StartServer = Callable[..., LiveServer]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOGGED] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the logs with every failure."""
    report = yield
    if report.failed:
        for server in item.config.stash[_LOGGED]:
            report.sections.append((f"log of {server.folder.name}", server.log()[-_SHOWN_LOG_CHARACTERS:]))
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the smallest sizes that have Mistral NeMo's proportions, with the first 3,096 ranks of Tekken."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "random",
        num_layers=2,
        hidden_size=128,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        ffn_size=256,
        vocab_size=4096,
        has_tekken=True,
    )


@pytest.fixture(scope="package")
def server(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LiveServer]:
    """The server that most tests share; at the end it must go as it promises."""
    shared = LiveServer(checkpoint, tmp_path_factory.mktemp("shared") / "server", kv_swap_ratio="0")
    request.config.stash[_LOGGED].append(shared)
    try:
        shared.start().wait_until_ready()
        yield shared
        shared.stop()
    finally:
        shared.kill_everything()
        request.config.stash[_LOGGED].remove(shared)


@pytest.fixture
def idle_server(server: LiveServer) -> Iterator[LiveServer]:
    """The shared server with nothing running, before the test and after it: every page is back in the pool."""
    wait_until_idle(server)
    yield server
    wait_until_idle(server)


@pytest.fixture
def start_server(checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """Starts servers of a test's own (`LiveServer`'s arguments; `is_ready` False does not wait); nothing survives the test."""
    started: list[LiveServer] = []

    def start(
        *,
        is_ready: bool = True,
        in_terminal: bool = False,
        grace_s: float = 30.0,
        has_gateway: bool = False,
        **settings: str,
    ) -> LiveServer:
        server = LiveServer(
            checkpoint, tmp_path / f"server-{len(started)}", grace_s=grace_s, has_gateway=has_gateway, **settings
        )
        started.append(server)
        request.config.stash[_LOGGED].append(server)
        server.start(in_terminal=in_terminal)
        return server.wait_until_ready() if is_ready else server

    try:
        yield start
    finally:
        for server in started:
            server.kill_everything()
            request.config.stash[_LOGGED].remove(server)
