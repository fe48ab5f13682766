"""One server with its gateway, as `make serve` starts them, on the demo checkpoint; and the openai package in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.triton.live_server import PROJECT, LiveServer

DEMO = PROJECT / "tests" / "demo" / "checkpoint"
MODEL = "mistral-nemo"


def start(folder: Path, **settings: Any) -> LiveServer:
    """A server with a gateway that serves."""
    server = LiveServer(DEMO, folder, has_gateway=True, **settings).start().wait_until_ready()
    server.wait_until_gateway_ready()
    return server


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The server that the tests of this folder share; at the end it must go as it promises."""
    server = start(tmp_path_factory.mktemp("live") / "server")
    try:
        yield server
        server.stop()
    finally:
        server.kill_everything()


@pytest.fixture
def base_url(live: LiveServer) -> str:
    return f"http://127.0.0.1:{live.openai_port}"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60.0) as made:
        yield made
