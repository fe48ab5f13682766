"""The service around a live server: texts and ids, one page of metrics, clients that go away, 256 streams at once, deaths."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from client.gateway.tool_calls import TOOL_CALLS_ID
from tests.gateway.conftest import DEMO, MODEL, start
from tests.gateway.test_openai_package import ANSWER, CHAT
from tests.triton.live_server import LiveServer, all_pids, command_line, http_get, kill, wait_until
from tests.triton.metrics import read_metrics, wait_for_metric, wait_until_idle

LONG: dict[str, Any] = CHAT | {"max_tokens": 3000, "ignore_eos": True}
CANCELLED = 'request_finish_total{finished_reason="cancelled"}'


@pytest.mark.parametrize("text", ["What is Tekken?", "", "é€😀 mixed \n\t text", "[TOOL_CALLS] is no control token"])
def test_texts_and_ids(base_url: str, text: str) -> None:
    with httpx2.Client(base_url=base_url, timeout=30.0) as client:
        found = client.post("/tokenize", json={"model": MODEL, "prompt": text}).json()
        assert found["count"] == len(found["tokens"])
        assert (found["tokens"][0], found["max_model_len"]) == (1, 4096)
        bare = client.post("/tokenize", json={"model": MODEL, "prompt": text, "add_special_tokens": False}).json()
        assert bare["tokens"] == found["tokens"][1:]
        for ids in (found["tokens"], bare["tokens"]):
            assert client.post("/detokenize", json={"model": MODEL, "tokens": ids}).json() == {"prompt": text}


def test_ids_of_chats(base_url: str) -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "done"},
    ]
    with httpx2.Client(base_url=base_url, timeout=30.0) as client:
        plain = client.post("/tokenize", json={"model": MODEL, "messages": messages[:1]}).json()["tokens"]
        with_calls = client.post("/tokenize", json={"model": MODEL, "messages": messages}).json()["tokens"]
        usage = client.post("/v1/chat/completions", json=CHAT | {"messages": messages[:1], "max_tokens": 1}).json()[
            "usage"
        ]
        assert usage["prompt_tokens"] == len(plain)
        assert TOOL_CALLS_ID in with_calls, "the template puts this id before calls"
        assert TOOL_CALLS_ID not in plain
        for body, param in (
            ({"messages": [{"role": "x"}]}, "messages"),
            ({"prompt": "x", "tools": []}, "tools"),
            ({"prompt": "x", "messages": messages}, "prompt"),
            ({"messages": messages, "add_special_tokens": True}, "add_special_tokens"),
        ):
            refused = client.post("/tokenize", json={"model": MODEL} | body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        for tokens in ([4096], [-1], [2**31], [1.5]):
            refused = client.post("/detokenize", json={"model": MODEL, "tokens": tokens})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"].startswith("tokens")


def test_metrics_of_engine_and_gateway_stand_on_one_page(base_url: str, live: LiveServer) -> None:
    httpx2.post(f"{base_url}/v1/chat/completions", json=CHAT, timeout=30.0)
    text = httpx2.get(f"{base_url}/v1/metrics").text
    for name in (
        "num_requests_running",
        "gpu_cache_usage_perc",
        "nv_inference_request_success",
        "nemo_gateway_requests_total",
    ):
        assert f"\n# TYPE {name.removesuffix('_total') if name.startswith('nemo_g') else name}" in text
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))
    assert httpx2.get(f"{base_url}/v1/metadata").json()["engineInfo"]["runner"] == "torch"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_request(live: LiveServer, stream: bool) -> None:
    wait_until_idle(live)
    before = read_metrics(live)
    body = json.dumps(LONG | {"stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", live.openai_port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for_metric(live, "num_requests_running", 1)
    wait_until_idle(live)
    wait_for_metric(live, CANCELLED, before[CANCELLED] + 1)
    after = read_metrics(live)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 2900, "it was not run to its end"


def test_256_streams_at_once_lose_nothing(base_url: str, live: LiveServer) -> None:
    short = CHAT | {"max_tokens": 16}

    async def ask_all() -> list[tuple[str, str, int]]:
        limits = httpx2.Limits(max_connections=None)
        async with (
            httpx2.AsyncClient(limits=limits, timeout=120.0) as http,
            openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):

            async def one() -> tuple[str, str, int]:
                text, reason, num_tokens = "", "", 0
                chunks = await client.chat.completions.create(
                    **short, stream=True, stream_options={"include_usage": True}
                )
                async for chunk in chunks:
                    for choice in chunk.choices:
                        text += choice.delta.content or ""
                        reason = choice.finish_reason or reason
                    num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
                return text, reason, num_tokens

            return list(await asyncio.gather(*(one() for _ in range(256))))

    answers = asyncio.run(ask_all())
    assert len(answers) == 256
    assert {answer[1:] for answer in answers} == {("length", 16)}
    (text,) = {answer[0] for answer in answers}
    assert ANSWER.startswith(text)
    wait_until_idle(live)


def test_full_queue_says_429(tmp_path: Path) -> None:
    server = start(tmp_path / "server", max_num_seqs="1", max_queued_requests="1")
    try:
        url = f"http://127.0.0.1:{server.openai_port}/v1/chat/completions"

        async def ask_all() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(timeout=60.0) as client:
                return list(await asyncio.gather(*(client.post(url, json=CHAT) for _ in range(8))))

        responses = asyncio.run(ask_all())
        assert {response.status_code for response in responses} == {200, 429}
        for response in responses:
            if response.status_code == 429:
                assert response.headers["retry-after"] == "1"
                assert response.json()["error"]["code"] == "queue_full"
            else:
                assert response.json()["choices"][0]["message"]["content"] == ANSWER
        server.stop()
    finally:
        server.kill_everything()


def test_loading_restarts_and_drain(tmp_path: Path) -> None:
    """Alive but not ready while the model loads; restarted when it dies; drained before the server; nothing is left."""
    server = LiveServer(DEMO, tmp_path / "server", has_gateway=True).start()
    try:
        wait_until(lambda: _status(server, "/v1/health/live") == 200, 60.0, server.log)
        assert _status(server, "/v1/health/ready") == 503
        wait_until(server.is_gateway_ready, 90.0, server.log)

        (gateway,) = _gateways(server)
        kill(gateway, signal.SIGKILL)
        wait_until(lambda: [pid for pid in _gateways(server) if pid != gateway], 10.0, server.log)
        wait_until(server.is_gateway_ready, 30.0, server.log)

        kill(server.pid_of("engine"), signal.SIGKILL)
        wait_until(lambda: not server.is_gateway_ready(), 10.0, server.log)
        wait_until(server.is_gateway_ready, 60.0, server.log)

        url = f"http://127.0.0.1:{server.openai_port}/v1/chat/completions"
        long = LONG | {"max_tokens": 600, "stream": True}
        with httpx2.stream("POST", url, json=long, timeout=60.0) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not server.is_gateway_ready(), 5.0, server.log)
            assert server.is_ready(), "the server goes on until the gateway's answers are over"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.assert_ended(0)
    finally:
        server.kill_everything()


def _status(server: LiveServer, path: str) -> int:
    try:
        return http_get(server.openai_port, path)[0]
    except OSError:
        return 0


def _gateways(server: LiveServer) -> list[int]:
    mine = set(server.pids())
    return [pid for pid in all_pids() if pid in mine and "-m client.gateway" in command_line(pid)]
