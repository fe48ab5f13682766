"""A scripted Triton, and one gateway in front of it for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.client.fake_triton import FakeTriton, Received, Reply, Step
from tests.unit.gateway.running_gateway import RunningGateway

PROMPT_IDS = [1, 3, 1500, 4]


def last(text: str, ids: list[int], reason: str = "stop", **more: list[Any]) -> Reply:
    """The last response of a sequence; `final` where it is the request's only one."""
    outputs: dict[str, list[Any]] = {
        "text_output": [text],
        "token_ids": ids,
        "finish_reason": [reason],
        "stop_reason": [""],
        "num_input_tokens": [7],
        "num_output_tokens": [len(ids)],
        "num_cached_tokens": [3],
    }
    return Reply(outputs | more, final=True)


def hello(received: Received) -> list[Step]:
    """What a gateway needs to answer: ids of a prompt, and an answer of two responses."""
    if received.model == "preprocessing":
        return [Reply({"prompt_token_ids": PROMPT_IDS}, final=True)]
    return [Reply({"text_output": ["Hel"], "token_ids": [11, 12]}), last("lo", [13, 2])]


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeTriton]:
    with FakeTriton(hello) as fake:
        yield fake


@pytest.fixture(scope="module")
def shared_gateway(shared_fake: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with RunningGateway(folder, shared_fake.grpc_address, "--triton-metrics", "127.0.0.1:9") as running:
        yield running


@pytest.fixture
def fake(shared_fake: FakeTriton) -> FakeTriton:
    """The scripted server as new."""
    shared_fake.script = hello
    shared_fake.ready = True
    shared_fake.received.clear()
    shared_fake.cancelled.clear()
    return shared_fake


@pytest.fixture
def gateway(fake: FakeTriton, shared_gateway: RunningGateway) -> RunningGateway:
    return shared_gateway
