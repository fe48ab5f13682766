"""What the machine may do to the engine: stop it, take its memory, fill its disk."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import ask
from tests.triton.live_server import LiveServer, kill, wait_until
from tests.triton.metrics import read_metrics, wait_until_idle
from tests.triton.running import NUM_KINDS, answer, only_in_make_faults, running

ANSWERED_TIMEOUT_S = 60.0
RESTARTS = "nemo_engine_restarts_total"
SCORES: dict[str, Any] = {
    "prompt_token_ids": [1 + n % 4000 for n in range(4000)],
    "max_tokens": 0,
    "prompt_logprobs": 20,
}
GUIDED: dict[str, Any] = {
    "text_input": "a",
    "max_tokens": 9,
    "guided_decoding_guide_type": "regex",
    "guided_decoding_guide": "[ab]{4}",
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def sturdy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Iterator[LiveServer]:
    """A server to whose engine the tests of this file do these things, one after the other."""
    server = LiveServer(checkpoint, tmp_path_factory.mktemp("sturdy") / "server", recording=str(recordings))
    try:
        yield server.start().wait_until_ready()
        server.stop()
    finally:
        server.kill_everything()


@pytest.fixture(scope="module")
def expected(sturdy: LiveServer) -> list[list[int]]:
    """The ids of a request by each of the ways, while nothing is wrong."""
    return [answer(sturdy, index, 40).ids() for index in range(NUM_KINDS)]


def serves_as_before(server: LiveServer, expected: list[list[int]]) -> None:
    """The same ids as ever, by every way."""
    assert [answer(server, index, 40).ids() for index in range(NUM_KINDS)] == expected
    wait_until_idle(server)


def is_replaced(server: LiveServer, engine: int) -> None:
    """Unready, as a probe sees it, then ready again with another engine."""
    wait_until(lambda: not server.is_ready(), ANSWERED_TIMEOUT_S, "still ready")
    server.wait_until_ready()
    assert server.pid_of("engine") != engine


def test_full_disk_while_recording(sturdy: LiveServer, expected: list[list[int]], recordings: Path) -> None:
    """The recording ends there, the log says so, and nothing else is any different."""
    engine = sturdy.pid_of("engine")
    (path,) = recordings.iterdir()
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (path.stat().st_size + 1000,) * 2)
    for _ in range(2):
        serves_as_before(sturdy, expected)
    line = f"the recording {path} ends here, it cannot be written: File too large"
    wait_until(lambda: line in sturdy.log(), 5.0, sturdy.log)
    assert sturdy.pid_of("engine") == engine


def test_an_engine_that_stops_for_a_while_goes_on(sturdy: LiveServer) -> None:
    """Shorter than the watchdog's patience: nothing is lost, and every answer is what it would have been."""
    undisturbed = [answer(sturdy, index, 300).ids() for index in range(NUM_KINDS)]
    engine, restarts = sturdy.pid_of("engine"), read_metrics(sturdy)[RESTARTS]
    with running(sturdy, max_tokens=300) as answers:
        kill(engine, signal.SIGSTOP)
        time.sleep(3.0)
        assert not any(each.done() for each in answers), "nothing ran any more when it was stopped"
        kill(engine, signal.SIGCONT)
        assert [each.result(ANSWERED_TIMEOUT_S).ids() for each in answers] == undisturbed
    assert sturdy.pid_of("engine") == engine
    assert read_metrics(sturdy)[RESTARTS] == restarts


@only_in_make_faults
def test_an_engine_that_stops_for_good_is_replaced(sturdy: LiveServer, expected: list[list[int]]) -> None:
    """What it worked on is answered with an error, and the server serves again."""
    engine, restarts = sturdy.pid_of("engine"), read_metrics(sturdy)[RESTARTS]
    with running(sturdy, max_tokens=3000) as answers:
        kill(engine, signal.SIGSTOP)
        assert len(wait(answers, timeout=ANSWERED_TIMEOUT_S).done) == NUM_KINDS, "a request was not answered"
        for each in answers:
            assert "it was stuck and was killed: it said nothing for 7 s" in str(each.exception())
    is_replaced(sturdy, engine)
    serves_as_before(sturdy, expected)
    assert read_metrics(sturdy)[RESTARTS] == restarts + 1


def test_out_of_host_memory(sturdy: LiveServer, expected: list[list[int]]) -> None:
    """An engine that may not map a page more: what needs one is answered with an error at once, and the server serves on."""
    engine = sturdy.pid_of("engine")
    with running(sturdy, max_tokens=3000) as answers:
        resource.prlimit(engine, resource.RLIMIT_AS, (1, 1))
        with suppress(InferenceServerException):
            assert ask(sturdy, **GUIDED).ids(), "an answer, or an error, but never none"
        with pytest.raises(InferenceServerException, match="the engine "):
            ask(sturdy, **SCORES)
        assert len(wait(answers, timeout=ANSWERED_TIMEOUT_S).done) == NUM_KINDS, "a request was not answered"
        assert any("emory" in str(each.exception()) for each in answers)
    is_replaced(sturdy, engine)
    serves_as_before(sturdy, expected)
