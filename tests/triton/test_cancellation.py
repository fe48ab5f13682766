"""A client that goes away stops its request, by every way, at every moment; and what it held is given back."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from client import Client, GenerationParams
from tests.triton.calls import (
    CALL_TIMEOUT_S,
    Answer,
    Stream,
    answer_from_events,
    ask,
    grpc_stream,
    post,
    reply_from_json,
    tensor,
)
from tests.triton.live_server import LiveServer, wait_until
from tests.triton.metrics import read_metrics, wait_for_metric, wait_until_idle

LONG: dict[str, Any] = {"prompt_token_ids": [1, 1500], "max_tokens": 4000}
WAITS_FOR_IDLE_S = 3.0
CANCELLED = 'request_finish_total{finished_reason="cancelled"}'
FAILED = "request_failure_total"
LENGTH = 'request_finish_total{finished_reason="length"}'


@contextmanager
def taken_back(server: LiveServer, counter: str) -> Iterator[None]:
    """The request of the body ends at once: it counts under `counter`, never as finished, and pages and slots are free."""
    before = read_metrics(server)
    yield
    wait_until_idle(server, WAITS_FOR_IDLE_S)
    wait_for_metric(server, counter, before[counter] + 1, timeout_s=2)
    assert read_metrics(server)[LENGTH] == before[LENGTH]


def wait_for_running(server: LiveServer, count: int = 1) -> None:
    wait_for_metric(server, "num_requests_running", count)


@contextmanager
def full_server(server: LiveServer) -> Iterator[None]:
    """All pages are held by requests that run for long: the next one has to wait."""
    num_holders = 65_536 // 4096
    with ExitStack() as stack:
        holders = [stack.enter_context(grpc_stream(server)) for _ in range(num_holders)]
        for holder in holders:
            holder.send(prompt_token_ids=[1], max_tokens=4095)
        wait_for_running(server, num_holders)
        yield


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_grpc_stream(idle_server: LiveServer, model: str, stream: bool) -> None:
    with taken_back(idle_server, CANCELLED), grpc_stream(idle_server) as call:
        call.send(model, **LONG, stream=stream)
        wait_for_running(idle_server)
        if stream:
            call.next()
            call.next()
        call.cancel()


def test_only_the_cancelled_stream_is_taken_back(idle_server: LiveServer) -> None:
    request: dict[str, Any] = {"text_input": "Hello", "max_tokens": 300, "temperature": 1.0, "seed": 4}
    expected = ask(idle_server, **request).summary()
    with grpc_stream(idle_server) as stays:
        stays.send(**request, stream=True, request_id="same")
        first = stays.next()
        with grpc_stream(idle_server) as goes:
            goes.send(**request, stream=True, request_id="same")
            goes.next()
            goes.cancel()
        assert Answer((first, *stays.until_final())).summary() == expected


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
def test_cancelled_during_a_long_prefill(idle_server: LiveServer, model: str) -> None:
    with taken_back(idle_server, FAILED), grpc_stream(idle_server) as call:
        call.send(model, prompt_token_ids=[1 + n % 4000 for n in range(4000)], max_tokens=96, num_return_sequences=8)
        wait_for_running(idle_server)
        call.cancel()


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
def test_cancelled_while_it_waits(idle_server: LiveServer, model: str) -> None:
    with full_server(idle_server):
        before = read_metrics(idle_server)
        with grpc_stream(idle_server) as call:
            call.send(model, **LONG, stream=True)
            wait_for_metric(idle_server, "num_requests_waiting", 1)
            call.cancel()
        wait_for_metric(idle_server, FAILED, before[FAILED] + 1, timeout_s=3)
        wait_until(lambda: read_metrics(idle_server)["num_requests_waiting"] == 0, 2.0, "it still waits")
        assert read_metrics(idle_server)["num_requests_running"] == 65_536 // 4096


def test_dropped_http_stream(idle_server: LiveServer) -> None:
    with taken_back(idle_server, CANCELLED):
        connection = http.client.HTTPConnection("127.0.0.1", idle_server.http_port, timeout=CALL_TIMEOUT_S)
        connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(LONG | {"stream": True}))
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
        connection.close()


def test_dropped_http_request_without_stream_is_covered_by_its_deadline(idle_server: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", idle_server.http_port, timeout=CALL_TIMEOUT_S)
    connection.request("POST", "/v2/models/ensemble/generate", json.dumps(LONG | {"deadline_ms": 700}))
    wait_for_running(idle_server)
    connection.close()
    wait_until_idle(idle_server, WAITS_FOR_IDLE_S)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_package_cancels_when_its_generator_is_closed(idle_server: LiveServer, protocol: Any) -> None:
    url = idle_server.grpc_url if protocol == "grpc" else idle_server.http_url
    with taken_back(idle_server, CANCELLED), Client(url, protocol=protocol, timeout_s=CALL_TIMEOUT_S) as client:
        responses = client.generate(prompt_token_ids=LONG["prompt_token_ids"], params=GenerationParams(max_tokens=4000))
        next(responses)
        responses.close()


def test_client_package_stops_what_another_client_runs(idle_server: LiveServer) -> None:
    with taken_back(idle_server, CANCELLED), grpc_stream(idle_server) as other, Client(idle_server.grpc_url) as client:
        other.send("ensemble", "mine", **LONG, stream=True)
        other.next()
        client.stop("mine")
        assert [reply.values("finish_reason") for reply in other.until_final(10.0)][-1] == ["cancelled"]


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
def test_stop_by_request_id(idle_server: LiveServer, model: str) -> None:
    with grpc_stream(idle_server) as stays, grpc_stream(idle_server) as first, grpc_stream(idle_server) as second:
        stays.send("ensemble", "other", **LONG, stream=True)
        first.send("ensemble", "mine", **LONG, stream=True)
        second.send("mistral_nemo", "mine", **LONG)
        wait_for_running(idle_server, 3)
        stays.next()
        begun = first.next()
        (answer,) = ask(idle_server, model, "mine", stop=True).replies
        assert answer.value("finish_reason") == "cancelled"
        assert Answer((begun, *first.until_final(2.0))).finish_reason() == "cancelled"
        assert Answer(tuple(second.until_final(2.0))).finish_reason() == "cancelled"
        stays.next()
        wait_until(lambda: read_metrics(idle_server)["num_requests_running"] == 1, 2.0, "both are still running")
        stays.next()


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
def test_stop_needs_a_request_id(idle_server: LiveServer, model: str) -> None:
    with grpc_stream(idle_server) as unnamed:
        unnamed.send(**LONG, stream=True)
        unnamed.next()
        with pytest.raises(InferenceServerException, match="stop: needs the request id"):
            ask(idle_server, model, stop=True)
        unnamed.next()
    assert ask(idle_server, model, "nobody has this", stop=True).replies[-1].is_final


def test_stop_false_is_an_ordinary_request(server: LiveServer) -> None:
    assert len(ask(server, text_input="Hello", max_tokens=3, stop=False).ids()) == 3


@pytest.mark.parametrize("way", ["grpc", "generate"])
def test_deadline_before_the_first_token_is_an_error(idle_server: LiveServer, way: str) -> None:
    problem = "deadline_ms: nothing was generated within 300 ms"
    with full_server(idle_server):
        if way == "grpc":
            with pytest.raises(InferenceServerException, match=problem):
                ask(idle_server, **LONG, deadline_ms=300)
        else:
            status, content = post(idle_server, "ensemble/generate", LONG | {"deadline_ms": 300})
            assert status == 400  # server 2.51 says so for every error of a model; gRPC gets the right status
            assert problem in content.decode()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["grpc", "http"])
def test_deadline_after_the_first_token_ends_the_answer(idle_server: LiveServer, way: str, stream: bool) -> None:
    request = LONG | {"deadline_ms": 400}
    if way == "grpc":
        answer = ask(idle_server, **request, stream=stream)
    else:
        path = "ensemble/generate_stream" if stream else "ensemble/generate"
        status, content = post(idle_server, path, request | {"stream": stream})
        assert status == 200
        answer = answer_from_events(content) if stream else Answer((reply_from_json(content),))
    assert answer.finish_reason() == "deadline"
    assert 0 < len(answer.ids()) < LONG["max_tokens"]
    last = answer.replies[-1]
    assert last.value("num_output_tokens") == len(answer.ids())
    assert 0.2e9 < last.value("last_token_time_ns") - last.value("arrival_time_ns") < 1.5e9


def test_grpc_status_of_an_error(idle_server: LiveServer) -> None:
    """With `triton_grpc_error` the stream itself ends with the status, as gRPC clients expect."""

    def status_of(**values: Any) -> str:
        with InferenceServerClient(idle_server.grpc_url) as client:
            stream = Stream(client, headers={"triton_grpc_error": "true"})
            stream.send(inputs=[tensor("prompt_token_ids", "INT32", [1])], **values)
            with pytest.raises(InferenceServerException) as refused:
                stream.next()
            stream.close()
        return str(refused.value.status())

    assert status_of(max_tokens=0) == "StatusCode.INVALID_ARGUMENT"
    with full_server(idle_server):
        assert status_of(max_tokens=4000, deadline_ms=200) == "StatusCode.UNAVAILABLE"
