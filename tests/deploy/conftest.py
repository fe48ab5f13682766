"""A live server with its gateway for the tests of monitoring, and one of a test's own for those that stop it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.triton.live_server import LiveServer

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "ffn_size": 256,
    "vocab_size": 131072, "has_tekken": True,
}  # fmt: skip


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", **(SIZES | {"vocab_size": 4096}))


@pytest.fixture(scope="package")
def monitored(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with its gateway that logs JSON."""
    server = LiveServer(
        checkpoint, tmp_path_factory.mktemp("monitored") / "server", has_gateway=True, log_format="json"
    )
    try:
        yield server.start().wait_until_ready()
        server.stop()
    finally:
        server.kill_everything()
