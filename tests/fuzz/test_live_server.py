"""A live server and its gateway, asked by clients that send anything; a good request beside them always gets the same answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import make_checkpoint
from tests.fuzz.cases import cases
from tests.fuzz.damage import TEXTS, damaged_bytes, damaged_json, json_text
from tests.fuzz.live_ways import MOST_NESTED, RawGrpc, check_gateway, check_triton, exchange, http_request, raw_requests
from tests.fuzz.parser import Case
from tests.fuzz.request_parsers import MESSAGES, TOOLS, WHOLE
from tests.fuzz.watch import keep_case
from tests.triton.calls import ask
from tests.triton.live_server import LiveServer, wait_until
from tests.triton.metrics import read_metrics, wait_until_idle
from tests.triton.soak import SIZES
from tests.triton.soak_call import Spoken
from tests.triton.usage import process_name, sample_process

GOOD: dict[str, Any] = {"text_input": "Hello", "max_tokens": 40, "temperature": 1.0, "seed": 8, "num_logprobs": 2}
_SHOWN_LOG_CHARACTERS = 6000
MORE_FILES = 12
"""Connections that are not closed yet, and what is opened once."""
_HEADERS = (
    "Content-Type",
    "Content-Length",
    "Transfer-Encoding",
    "Authorization",
    "X-Request-Id",
    "Host",
    "Accept",
    "Expect",
    "é",
)
_CHAT = {"model": "mistral-nemo", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 4, "stream": False}
_COMPLETION = {
    "model": "mistral-nemo",
    "prompt": "Hello",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 2,
    "seed": 3,
    "stop": ["x"],
    "logprobs": 2,
    "logit_bias": {"5": 1.0},
    "stream": True,
    "stream_options": {"include_usage": True},
    "guided_regex": "[a-c]{3}",
    "top_k": 5,
    "min_p": 0.1,
    "priority": 1,
    "cache_salt": "x",
    "echo": False,
}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {**_CHAT, "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True}),
    ("/v1/completions", _COMPLETION),
    ("/v1/completions", {"model": "mistral-nemo", "prompt": [[1, 1500], [1, 1501]], "max_tokens": 3}),
    ("/tokenize", {"model": "mistral-nemo", "messages": MESSAGES}),
    ("/tokenize", {"prompt": "Hello", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 1500, 1501]}),
)

TRITONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ensemble", WHOLE),
    ("ensemble", {"messages": json.dumps(MESSAGES), "tools": json.dumps(TOOLS), "max_tokens": 4}),
    ("mistral_nemo", {"prompt_token_ids": [1, 1500], "max_tokens": 4, "stop_words": ["a"]}),
    ("postprocessing", {"token_ids": [1500, 1501]}),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """With a short context, so that no request is long, and room for swapping."""
    folder = tmp_path_factory.mktemp("live")
    checkpoint = make_checkpoint(folder / "checkpoint", **SIZES)
    live = LiveServer(checkpoint, folder / "server", has_gateway=True, max_model_len="160", default_max_tokens="8")
    try:
        live.start().wait_until_ready()
        live.wait_until_gateway_ready()
        yield live
        live.stop()
    finally:
        live.kill_everything()


@contextmanager
def beside(server: LiveServer) -> Iterator[None]:
    """A good request runs again and again, and is answered as it was alone; afterwards everything is given back."""
    wait_until_idle(server)
    expected, held = _answer(server), _open_files(server)
    restarts = read_metrics(server)["nemo_engine_restarts_total"]
    others: list[Any] = []
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            try:
                others.append(_answer(server))
            except Exception as error:  # whatever it is, a good request was disturbed
                others.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert [other for other in others if other != expected] == []
    assert others
    wait_until_idle(server)
    assert read_metrics(server)["nemo_engine_restarts_total"] == restarts
    assert "Traceback" not in server.log()
    wait_until(lambda: not _more_files(server, held), 60.0, lambda: f"more open files: {_more_files(server, held)}")


def _answer(server: LiveServer) -> Spoken:
    """Ids, text and log-probabilities, to the bit."""
    return Spoken.of(ask(server, **GOOD), 0)


def _open_files(server: LiveServer) -> dict[str, float]:
    samples = {process_name(pid, server): sample_process(pid) for pid in server.pids()}
    return {name: sample[1] for name, sample in samples.items() if sample is not None}


def _more_files(server: LiveServer, before: dict[str, float]) -> dict[str, float]:
    now = _open_files(server)
    return {name: count for name, count in now.items() if count > before.get(name, count) + MORE_FILES}


def run_cases(server: LiveServer, strategy: st.SearchStrategy[bytes], send: Callable[[bytes], None], full: int) -> None:
    """Send drawn requests, as bytes, one after the other; the server must be there after each."""
    count = 0

    @cases(small=12, full=full, is_shrunk=False)
    @given(strategy.map(Case))
    def run(case: Case) -> None:
        nonlocal count
        count += 1
        try:
            send(case.content)
            assert server.is_ready()
        except BaseException as error:
            keep_case(error, case.content)
            error.add_note(server.log()[-_SHOWN_LOG_CHARACTERS:])
            raise

    with beside(server):
        run()
    print(f"{count} cases")


@st.composite
def bodies(draw: st.DrawFn, samples: tuple[tuple[str, dict[str, Any]], ...]) -> bytes:
    """Whole HTTP requests with damaged bodies."""
    path, body = draw(st.sampled_from(samples))
    is_text = draw(st.integers(0, 3)) == 0
    content = damaged_bytes(draw, json.dumps(body).encode()) if is_text else json_text(damaged_json(draw, body))
    return http_request(path, content, (("Content-Type", "application/json"),))


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Whole HTTP requests with odd paths and headers, or damaged as bytes."""
    path, body = draw(st.sampled_from(BODIES))
    names = st.sampled_from(_HEADERS)
    values = st.sampled_from([text[:5000].replace("\n", "\\n") for text in TEXTS])
    headers = tuple(draw(st.lists(st.tuples(names, values), max_size=4)))
    path += draw(st.sampled_from(("", "?x=%00", "/../../etc/passwd", "%2e%2e", "/" + "x" * 9000)))
    request = http_request(path, json.dumps(body).encode(), (("Content-Type", "application/json"), *headers))
    return damaged_bytes(draw, request) if draw(st.booleans()) else request


@pytest.mark.timeout(3600)
def test_tritons_http(server: LiveServer) -> None:
    samples = tuple(
        (f"/v2/models/{model}/{kind}", body) for kind in ("generate", "generate_stream") for model, body in TRITONS
    )
    drawn = bodies(samples).filter(lambda content: content.count(b"[") + content.count(b"{") <= MOST_NESTED)
    run_cases(server, drawn, lambda content: check_triton(exchange(server.http_port, content)), full=700)


@pytest.mark.timeout(3600)
def test_tritons_grpc(server: LiveServer) -> None:
    client = RawGrpc(server)
    try:
        run_cases(server, raw_requests(), client.infer, full=700)
    finally:
        client.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", [bodies(BODIES), heads()], ids=["bodies", "heads"])
def test_the_gateway(server: LiveServer, strategy: st.SearchStrategy[bytes]) -> None:
    run_cases(server, strategy, lambda content: check_gateway(exchange(server.openai_port, content)), full=600)
