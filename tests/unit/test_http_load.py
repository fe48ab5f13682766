"""The load on llama.cpp's server, against a server that says what a script has: each token is counted once, when it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from client.load_report import LoadReport
from tests.bench.peers import http_load

TIMEOUT_S = 30.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
BODY: dict[str, object] = {"prompt": [1, 2], "n_predict": 5, "stream": True}
Script = Callable[[dict[str, Any], Callable[[bytes], Awaitable[None]]], Awaitable[None]]


def event(num_tokens: int, *, stop: bool = False) -> bytes:
    """So many tokens until now."""
    return b"data: " + json.dumps({"content": "x", "tokens_predicted": num_tokens, "stop": stop}).encode() + b"\n\n"


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[int]:
    """The port of a server that runs `script` for each request, with its body and a way to send bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(content: bytes) -> None:
            writer.write(content)
            await writer.drain()

        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            assert head.startswith("POST /completion HTTP/1.1\r\n")
            (length,) = (int(line.split(": ")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
            await script(json.loads(await reader.readexactly(length)), send)
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def run(check: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(check(), TIMEOUT_S))


def test_tokens_are_counted_by_what_each_event_adds_at_the_moment_it_comes() -> None:
    """The server sends each event only when the one before was counted; one is cut in two, and one adds nothing."""
    report = LoadReport(num_streams=1, num_prompt_tokens=2)

    async def until(num_responses: int) -> None:
        while report.num_responses < num_responses:
            await asyncio.sleep(0.001)

    async def script(body: dict[str, Any], send: Callable[[bytes], Awaitable[None]]) -> None:
        assert body == BODY
        await send(HEAD + event(1))
        await until(1)
        await send(event(3)[:9])
        await asyncio.sleep(0.02)
        assert report.num_responses == 1
        await send(event(3)[9:])
        await until(2)
        await send(event(3) + event(5, stop=True))

    async def check() -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with serving(script) as port:
            await http_load.request("127.0.0.1", port, BODY, report)
        assert sum(report.first_token_s) + sum(report.gaps_s) <= loop.time() - began_s

    run(check)
    assert report.num_output_tokens == 5
    assert report.num_responses == 3
    assert (len(report.first_token_s), len(report.gaps_s)) == (1, 2)
    assert report.gaps_s[0] >= 0.02


@pytest.mark.parametrize("sent", [b"", HEAD + event(2), b"HTTP/1.1 500 Internal Server Error\r\n\r\n{}"])
def test_a_stream_that_does_not_end_in_order_is_an_error(sent: bytes) -> None:
    async def script(body: dict[str, Any], send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(sent)

    async def check() -> None:
        async with serving(script) as port:
            with pytest.raises(RuntimeError, match=f"the stream ended after {2 if event(2) in sent else 0} tokens"):
                await http_load.request("127.0.0.1", port, BODY, LoadReport(num_streams=1, num_prompt_tokens=2))

    run(check)


def report_of(script: Script, capsys: pytest.CaptureFixture[str], seconds: float) -> dict[str, Any]:
    """What `main` prints of two streams."""

    async def check() -> None:
        async with serving(script) as port:
            assert await http_load.main(f"http://127.0.0.1:{port}", 2, seconds, 3, 7) == 0

    run(check)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_loop_asks_again_and_counts_what_is_cut_off_by_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    bodies: list[dict[str, Any]] = []

    async def script(body: dict[str, Any], send: Callable[[bytes], Awaitable[None]]) -> None:
        bodies.append(body)
        await send(HEAD + event(7, stop=len(bodies) < 5))
        if len(bodies) >= 5:
            await asyncio.sleep(TIMEOUT_S)

    report = report_of(script, capsys, 0.5)
    assert all(len(body["prompt"]) == 3 and body["n_predict"] == 7 and body["stream"] for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == len(bodies), "a prompt twice: a cache would help"
    assert report["errors"] == {}
    assert (report["requests_done"], report["requests_unfinished"], len(bodies)) == (4, 2, 6)
    assert report["output_tokens"] == 6 * 7


def test_failures_are_counted_and_end_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    num_asked = 0

    async def script(body: dict[str, Any], send: Callable[[bytes], Awaitable[None]]) -> None:
        nonlocal num_asked
        num_asked += 1
        await send(HEAD + event(4) if num_asked == 3 else HEAD + event(7, stop=True))

    report = report_of(script, capsys, TIMEOUT_S)
    assert report["errors"] == {"RuntimeError('the stream ended after 4 tokens')": 1}
    assert report["requests_done"] >= 2


def test_a_server_that_is_not_there_is_an_error_of_every_stream(capsys: pytest.CaptureFixture[str]) -> None:
    async def check() -> None:
        async with serving(lambda *_: asyncio.sleep(0)) as port:
            pass
        assert await http_load.main(f"http://127.0.0.1:{port}", 1, TIMEOUT_S, 3, 7) == 0

    run(check)
    (problem,) = json.loads(capsys.readouterr().out)["errors"]
    assert "ConnectionRefusedError" in problem
