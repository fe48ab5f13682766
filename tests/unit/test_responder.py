"""The sending thread: what is due goes out before it ends, and the engine is told of generated ids, not of an echo."""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.engine.events import Finish, FinishReason, TokenEvent
from backend.engine.request import GenerationRequest
from backend.triton_adapter.chunk_window import MOST_CHUNKS
from backend.triton_adapter.presence import RUN_DIR_VARIABLE
from tests.triton_stub import triton_stub

FINISH = Finish(FinishReason.LENGTH, "", 3, 1, 0, 0, 0, 0, 0)
TIMEOUT_S = 20.0


class Sender:
    """Counts what a client gets."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_ended = 0

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.num_sent += response is not None
        self.num_ended += flags

    def is_cancelled(self) -> bool:
        return False


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    with triton_stub():
        yield importlib.import_module("backend.triton_adapter.responder")


def stream_of(module: Any, request: GenerationRequest, *outputs: str) -> Any:
    return module.Stream(request, Sender(), {"stream_chunk", "finish_reason", *outputs}, 0)


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_what_is_due_goes_out_before_the_end_though_nothing_arrives_any_more(module: Any) -> None:
    """More streams than may be under way, and postprocessing sees none of their chunks."""
    responder = module.Responder(lambda _: None, None, lambda _: None, lambda: None)
    streams = [
        stream_of(module, GenerationRequest(handle, "", (1, 2, 3), 1, stream=True)) for handle in range(3 * MOST_CHUNKS)
    ]
    for stream in streams:
        responder.open(stream)
    ids = (1000,)
    responder.add(
        tuple(TokenEvent(s.request.handle, 0, ids, ids, 0, 1, False, FINISH, is_request_end=True) for s in streams)
    )
    wait_until(lambda: sum(stream.sender.num_sent for stream in streams) >= MOST_CHUNKS)
    responder.close()
    assert [(stream.sender.num_sent, stream.sender.num_ended) for stream in streams] == [(1, 1)] * len(streams)


def test_the_engine_is_told_of_generated_ids_alone(module: Any) -> None:
    told: Counter[int] = Counter()
    changed = threading.Condition()

    def report(counts: dict[int, int]) -> None:
        with changed:
            told.update(counts)
            changed.notify()

    responder = module.Responder(lambda _: None, report, lambda _: None, lambda: None)
    prompt = (1, 2, 3)
    request = GenerationRequest(7, "", prompt, 9, stream=True, echo=True, num_return_sequences=2)
    responder.open(stream_of(module, request))
    for index in range(2):
        responder.add((TokenEvent(7, index, (*prompt, 1000), (1000,), 0, 1, False, None),))
        responder.add((TokenEvent(7, index, (1001,), (1001,), 0, 1, False, None),))
    with changed:
        assert changed.wait_for(lambda: told[7] >= 4, TIMEOUT_S)
    responder.close()
    assert told == {7: 4}


def test_chunks_of_direct_clients_hold_nothing_up(module: Any) -> None:
    """They ask for all outputs, so chunks are among them, and postprocessing sees none."""
    responder = module.Responder(lambda _: None, None, lambda _: None, lambda: None)
    window = responder._window
    for handle in range(3 * MOST_CHUNKS):
        stream = stream_of(module, GenerationRequest(handle, "", (1, 2, 3), 1, stream=True), "token_ids")
        responder.open(stream)
        responder.add((TokenEvent(handle, 0, (1000,), (1000,), 0, 1, False, FINISH, is_request_end=True),))
        wait_until(lambda stream=stream: stream.sender.num_ended == 1)  # type: ignore[misc]
        assert not window.is_full(time.monotonic())
    responder.close()
