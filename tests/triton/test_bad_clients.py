"""Clients that stop reading, fall silent in mid-request, or connect and leave a thousand times: others notice nothing."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.triton.calls import CALL_TIMEOUT_S, ask, post, tensors
from tests.triton.live_server import LiveServer, all_pids, command_line, http_get, wait_until
from tests.triton.metrics import read_metrics, wait_for_metric, wait_until_idle
from tests.triton.running import only_in_make_faults

REQUEST: dict[str, Any] = {"prompt_token_ids": [1, 1500, 2600], "max_tokens": 24, "temperature": 1.0, "seed": 5}
# Its answer has megabytes: more than sockets hold.
VERBOSE: dict[str, Any] = {
    "prompt_token_ids": [1],
    "max_tokens": 1500,
    "ignore_eos": True,
    "stream": True,
    "num_logprobs": 20,
}
NUM_CONNECTIONS = 1000
NUM_SILENT = 99


@pytest.fixture(scope="module")
def public(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with its gateway; stopped at the end with silent connections on every port."""
    server = LiveServer(checkpoint, tmp_path_factory.mktemp("public") / "server", has_gateway=True)
    try:
        server.start().wait_until_ready()
        server.wait_until_gateway_ready()
        yield server
        with ExitStack() as stack:
            for port in ports(server):
                stack.enter_context(silent(port))
            server.stop()
    finally:
        server.kill_everything()


def ports(server: LiveServer) -> tuple[int, ...]:
    return server.http_port, server.grpc_port, server.metrics_port, server.openai_port


def silent(
    port: int, said: bytes = b"POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Le"
) -> closing[socket.socket]:
    """A connection that says the beginning of something, and no more."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=CALL_TIMEOUT_S)
    connection.sendall(said)
    return closing(connection)


def serves(server: LiveServer) -> list[Any]:
    """What a request gets by each of the three ways in; None for a failure."""
    chat = {"model": "mistral-nemo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    status, content = post(server, "ensemble/generate", REQUEST)
    text = json.loads(content)["text_output"] if status == 200 else None
    return [ask(server, **REQUEST).ids(), text, post_chat(server, chat)]


def post_chat(server: LiveServer, body: dict[str, Any]) -> Any:
    with open_post(server.openai_port, "/v1/chat/completions", body) as connection:
        content = b"".join(iter(lambda: connection.recv(65536), b""))
    return json.loads(content.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]


def open_post(port: int, path: str, body: dict[str, Any], buffer_bytes: int = 0) -> closing[socket.socket]:
    """A request on a connection of its own, that ends with the answer; the client holds `buffer_bytes` at most."""
    connection = socket.socket()
    if buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    connection.settimeout(CALL_TIMEOUT_S)
    connection.connect(("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return closing(connection)


@pytest.mark.parametrize("way", ["http", "grpc", "openai"])
def test_clients_that_stop_reading(public: LiveServer, way: str) -> None:
    """Their requests run to the end and give everything back, while nobody reads; others are answered as ever."""
    before = serves(public)
    wait_until_idle(public)
    finished = 'request_finish_total{finished_reason="length"}'
    num_finished = read_metrics(public)[finished]
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(unread(public, way))
        assert serves(public) == before
        wait_until_idle(public, 2 * CALL_TIMEOUT_S)
        wait_for_metric(public, finished, num_finished + 4 + len(before))
    assert serves(public) == before


@contextmanager
def unread(server: LiveServer, way: str) -> Iterator[None]:
    """A stream of which nothing but the beginning is read."""
    if way == "grpc":
        request = service_pb2.ModelInferRequest(model_name="ensemble")
        for made in tensors(VERBOSE):
            request.inputs.append(made._get_tensor())
            request.raw_input_contents.append(made._get_content())
        with grpc.insecure_channel(server.grpc_url) as channel:
            responses = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
            assert not next(responses).error_message
            yield
        return
    chat: dict[str, Any] = {"model": "mistral-nemo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    chat |= {"max_tokens": 400, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    port, path, body = {
        "http": (server.http_port, "/v2/models/ensemble/generate_stream", VERBOSE),
        "openai": (server.openai_port, "/v1/chat/completions", chat),
    }[way]
    with open_post(port, path, body, buffer_bytes=4096) as connection:
        assert connection.recv(16).startswith(b"HTTP/1.1 200")
        yield


def test_connections_that_fall_silent(public: LiveServer) -> None:
    """Dozens on every port, each in the middle of a request or of a handshake: requests are answered as ever."""
    before = serves(public)
    with ExitStack() as stack:
        for port in ports(public):
            for said in (b"", b"PRI * HTTP/2.0\r\n\r\nSM", b"POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Le"):
                for _ in range(NUM_SILENT // 3):
                    stack.enter_context(silent(port, said))
        assert serves(public) == before
        assert http_get(public.metrics_port, "/metrics")[0] == 200
    assert serves(public) == before


def test_a_thousand_connects_and_disconnects(public: LiveServer) -> None:
    """On every port, half of them with the beginning of a request: no handle stays open."""
    before = serves(public)
    counted = [num_handles(pid) for pid in listeners(public)]
    for port in ports(public):
        for number in range(NUM_CONNECTIONS):
            with silent(port, b"GET / HTT" if number % 2 else b""):
                pass
    assert serves(public) == before

    def grown() -> list[int]:
        return [now - then for now, then in zip(map(num_handles, listeners(public)), counted, strict=True)]

    wait_until(lambda: max(grown()) <= 8, 30.0, lambda: f"handles more than before: {grown()}")


def listeners(server: LiveServer) -> list[int]:
    """Those who listen: tritonserver and the gateway."""
    mine = set(server.pids())
    gateways = [pid for pid in all_pids() if pid in mine and "-m client.gateway" in command_line(pid)]
    return [server.pid_of("tritonserver"), *gateways]


def num_handles(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@only_in_make_faults
def test_json_that_is_nested_too_deep_for_the_server(public: LiveServer) -> None:
    """Server 2.51 reads JSON by recursion, and its HTTP thread's stack ends at about 100,000 levels; the gateway refuses that."""
    before = serves(public)
    body = b"[" * 200_000 + b"]" * 200_000
    connection = http.client.HTTPConnection("127.0.0.1", public.openai_port, timeout=CALL_TIMEOUT_S)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400
    connection.close()
    assert serves(public) == before
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        post(public, "ensemble/generate", body)
    wait_until(lambda: "tritonserver ended with status -11; starting the server anew" in public.log(), 10.0, public.log)
    public.wait_until_ready()
    public.wait_until_gateway_ready()
    assert serves(public) == before
