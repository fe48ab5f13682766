"""The service around the answers: health, keys, TLS, bounds, ids, logs, clients that go away, drain."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from tests.triton.live_server import free_ports, wait_until
from tests.unit.client.fake_triton import FakeTriton, Pause, Received, Reply, Step
from tests.unit.gateway.conftest import last
from tests.unit.gateway.running_gateway import MODEL, RunningGateway

KEY = "sk-0123456789abcdef"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "my secret prompt"}]}


def slow(_: Received) -> Iterator[Step]:
    """A token, a long silence, and another."""
    yield Reply({"text_output": ["Hel"], "token_ids": [11]})
    yield Pause(60.0)
    yield last("lo", [12])


def test_health_follows_the_ensemble(gateway: RunningGateway, fake: FakeTriton) -> None:
    with gateway.client() as client:
        assert client.get("/v1/health/ready").status_code == 200
        fake.ready = False
        assert client.get("/v1/health/ready").status_code == 503
        assert client.get("/v1/health/live").status_code == 200


def test_health_without_a_server(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with RunningGateway(tmp_path, f"127.0.0.1:{port}") as gateway, gateway.client() as client:
        assert client.get("/v1/health/live").status_code == 200
        assert client.get("/v1/health/ready").status_code == 503
        refused = client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert client.get("/v1/metrics").text.count("nemo_gateway_engine_metrics_up 0.0") == 1


def test_models_and_versions(gateway: RunningGateway) -> None:
    with gateway.client() as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [MODEL]
        assert client.get(f"/v1/models/{MODEL}").json()["object"] == "model"
        assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
        assert client.get("/v1/version").json()["release"]
        assert client.get("/v1/metadata").json()["modelInfo"][0]["shortName"] == MODEL
        missing = client.get("/v1/engines")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        wrong = client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_unknown_model(gateway: RunningGateway, fake: FakeTriton) -> None:
    response = gateway.chat(model="gpt-4")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.post("/tokenize", model="gpt-4", prompt="x").status_code == 404
    assert fake.received == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b'{"model": NaN}', b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_json_object(gateway: RunningGateway, content: bytes) -> None:
    with gateway.client() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            response = client.post(path, content=content, headers={"content-type": "application/json"})
            assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_keys(fake: FakeTriton, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    with RunningGateway(tmp_path, fake.grpc_address, "--api-keys-file", str(file)) as gateway:
        with gateway.client() as client:
            for path in ("/v1/models", f"/v1/models/{MODEL}"):
                refused = client.get(path)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                assert client.post(path, json=CHAT).status_code == 401
            for path in ("/", "/v1/health/live", "/v1/health/ready", "/v1/metrics", "/v1/version", "/openapi.json"):
                assert client.get(path).status_code == 200
        with gateway.client(authorization=f"Bearer {KEY}x") as client:
            assert client.post("/v1/chat/completions", json=CHAT).json()["error"]["code"] == "invalid_api_key"
        assert fake.received == []
        with gateway.client(authorization=f"Bearer {KEY}") as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert KEY not in gateway.log()


def test_tls(fake: FakeTriton, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(cert, append=True)
    issued.private_key_pem.write_to_path(key)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    arguments = ("--tls-cert", str(cert), "--tls-key", str(key))
    with RunningGateway(tmp_path, fake.grpc_address, *arguments, scheme="https") as gateway:
        with httpx2.Client(base_url=gateway.url, verify=trust) as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(f"http://127.0.0.1:{gateway.port}/v1/health/live")


def test_bounds(fake: FakeTriton, tmp_path: Path) -> None:
    arguments = ("--max-body-bytes", "2048", "--max-messages", "2", "--max-prompts", "3")
    with RunningGateway(tmp_path, fake.grpc_address, *arguments) as gateway, gateway.client() as client:

        def chunked() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        for content in (b" " * 2049, chunked()):
            response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert "2048 bytes (max_body_bytes)" in response.json()["error"]["message"]
        many = client.post("/v1/chat/completions", json=CHAT | {"messages": CHAT["messages"] * 3})
        assert (many.status_code, many.json()["error"]["param"]) == (400, "messages")
        prompts = client.post("/v1/completions", json={"model": MODEL, "prompt": ["a"] * 4})
        assert (prompts.status_code, prompts.json()["error"]["param"]) == (400, "prompt")
        assert fake.received == []


def test_request_ids_go_in_and_out(gateway: RunningGateway, fake: FakeTriton) -> None:
    with gateway.client() as client:
        response = client.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine-1"})
        assert response.headers["x-request-id"] == fake.received[-1].request_id == "mine-1"
        for bad in ("", "with blank", "x" * 129):
            made = client.get("/v1/version", headers={"X-Request-Id": bad}).headers["x-request-id"]
            assert made.startswith("req-")
        assert client.get("/nowhere", headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"


def test_log_lines_say_everything_but_the_prompt(fake: FakeTriton, tmp_path: Path) -> None:
    for argument in ((), ("--log-prompts",)):
        with RunningGateway(tmp_path, fake.grpc_address, *argument) as gateway, gateway.client() as client:
            client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers={"X-Request-Id": "mine"})
            lines = wait_until(lambda: gateway.lines_of("mine"), 10.0, gateway.log)
            assert len(lines) == 1, gateway.log()
            found = {name: lines[0][name] for name in ("level", "path", "status", "prompt_tokens", "completion_tokens")}
            assert found == {
                "level": "info",
                "path": "/v1/chat/completions",
                "status": 200,
                "prompt_tokens": 7,
                "completion_tokens": 2,
            }
            assert lines[0]["finish_reasons"] == ["stop"]
            assert 0 < lines[0]["first_token_ms"] <= lines[0]["duration_ms"]
            assert ("secret" in gateway.log()) is bool(argument)


def test_metrics_count_requests(fake: FakeTriton, tmp_path: Path) -> None:
    with RunningGateway(tmp_path, fake.grpc_address, "--triton-metrics", "127.0.0.1:9") as gateway:
        gateway.chat()
        gateway.chat(n=0)
        with gateway.client() as client:
            client.get("/a/path/somebody/made/up")
            text = client.get("/v1/metrics").text
    assert 'nemo_gateway_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'nemo_gateway_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert 'nemo_gateway_requests_total{path="other",status="404"} 1.0' in text
    assert "made/up" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_request_back(tmp_path: Path, stream: bool) -> None:
    with FakeTriton(slow) as fake, RunningGateway(tmp_path, fake.grpc_address) as gateway:
        body = json.dumps(CHAT | {"stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            if stream:
                assert connection.recv(12) == b"HTTP/1.1 200"
            wait_until(lambda: fake.received, 10.0, "the request did not come")
            assert not fake.cancelled.is_set()
        assert fake.cancelled.wait(5.0)
        (line,) = wait_until(lambda: gateway.lines_of("gone"), 10.0, gateway.log)
        assert line["disconnected"] is True


def test_drain_lets_answers_finish(fake: FakeTriton, tmp_path: Path) -> None:
    go_on = threading.Event()

    def script(_: Received) -> Iterator[Step]:
        yield Reply({"text_output": ["Hel"], "token_ids": [11]})
        assert go_on.wait(30)
        yield last("lo", [12])

    fake.script = script
    with RunningGateway(tmp_path, fake.grpc_address) as gateway, gateway.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            lines = response.iter_lines()
            assert "Hel" in next(lines)
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx2.get(f"{gateway.url}/v1/health/ready").status_code == 503, 5.0, gateway.log)
            assert "draining" in httpx2.get(f"{gateway.url}/v1/health/ready").text
            assert httpx2.get(f"{gateway.url}/v1/health/live").status_code == 200
            refused = gateway.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            go_on.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert gateway.process.wait(30) == 0


@pytest.mark.parametrize("how", ["grace is over", "second signal"])
def test_drain_does_not_wait_for_ever(fake: FakeTriton, tmp_path: Path, how: str) -> None:
    fake.script = slow
    grace_s = "0.5" if how == "grace is over" else "600"
    with RunningGateway(tmp_path, fake.grpc_address, "--grace-s", grace_s) as gateway, gateway.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            assert "Hel" in next(response.iter_lines())
            since_s = time.monotonic()
            gateway.process.send_signal(signal.SIGINT)
            if how == "second signal":
                wait_until(lambda: "draining" in gateway.log(), 5.0, gateway.log)
                gateway.process.send_signal(signal.SIGINT)
            assert gateway.process.wait(30) == 0, gateway.log()
            assert time.monotonic() - since_s < 25.0
        assert fake.cancelled.wait(5.0)
