"""What the OpenAI gateway costs: the same requests over it and over raw gRPC, in the same run, from an engine that costs nothing.

    python -m tests.bench.bench_gateway [--seconds 10] [--streams 1 16 64] [--first-tokens 200]

First tokens are taken one request at a time, both ways in turn, so that whatever else the machine does meets both. Tokens per
second are taken with `--streams` requests at a time, also in turn. Client, gateway and server share the cores. Every answer is
checked to be whole. Writes results/gateway.json and the table in client/gateway/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.gateway.completion_request import CompletionRequest, plan_completion
from client.gateway.ensemble import Ensemble
from client.gateway.tables import README
from tests.bench.bench_ensemble import measure
from tests.bench.conditions import conditions, write_results
from tests.bench.tables import gateway_table
from tests.checkpoints import make_checkpoint
from tests.gateway.conftest import MODEL
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_until_idle

BEGIN, END = "<!-- bench: begin (written by python -m tests.bench.bench_gateway) -->", "<!-- bench: end -->"
_PROMPT_TOKENS = 64
_MAX_TOKENS = 512
_REPEATS = 3


def body(generator: random.Random, max_tokens: int) -> dict[str, Any]:
    """A completion of random ids, as `client.load` asks for over gRPC."""
    ids = [generator.randrange(1000, 4000) for _ in range(_PROMPT_TOKENS)]
    return {
        "model": MODEL,
        "prompt": ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


async def first_tokens(server: LiveServer, count: int) -> dict[str, list[float]]:
    """Milliseconds to the first token of `count` requests each way, in turn.

    Raw gRPC is asked as the gateway asks it, so that the difference is what the gateway adds and not another client library.
    """
    generator = random.Random(1)
    found: dict[str, list[float]] = {"grpc": [], "gateway": []}
    connection = http.client.HTTPConnection("127.0.0.1", server.openai_port, timeout=60)
    ensemble = Ensemble(server.grpc_url)
    for _ in range(count):
        request = body(generator, 4)
        (call,) = plan_completion(CompletionRequest(**request), 1)
        since_s = time.perf_counter()
        pieces = ensemble.generate(call, "")
        first = await anext(pieces)
        found["grpc"].append((time.perf_counter() - since_s) * 1e3)
        *_, last = [first, *[piece async for piece in pieces]]
        assert last.response.num_output_tokens == 4
        since_s = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        found["gateway"].append((time.perf_counter() - since_s) * 1e3)
        assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    await ensemble.close()
    return found


async def one_stream(port: int, generator: random.Random, end_s: float) -> int:
    """Tokens of whole answers, one after the other, until `end_s`; each must have all of its tokens."""
    num_tokens = 0
    while time.monotonic() < end_s:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        content = json.dumps(body(generator, _MAX_TOKENS) | {"stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + content)
        answer_tokens = 0
        async for line in reader:
            if b'"usage":{' in line:
                answer_tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        writer.close()
        if answer_tokens != _MAX_TOKENS:
            raise RuntimeError(f"an answer had {answer_tokens} tokens, not {_MAX_TOKENS}")
        num_tokens += answer_tokens
    return num_tokens


def gateway_speed(server: LiveServer, num_streams: int, seconds: float) -> float:
    """Tokens per second with so many requests at a time."""

    async def run() -> float:
        since_s = time.monotonic()
        streams = [one_stream(server.openai_port, random.Random(n), since_s + seconds) for n in range(num_streams)]
        num_tokens = sum(await asyncio.gather(*streams))
        return num_tokens / (time.monotonic() - since_s)

    return asyncio.run(run())


def measure_all(streams: Sequence[int], seconds: float, num_first: int) -> dict[str, Any]:
    """First tokens and speeds, both ways."""
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_size": 96, "vocab_size": 4096}
        checkpoint = make_checkpoint(Path(folder, "checkpoint"), has_tekken=True, **sizes)
        settings: dict[str, Any] = {"runner": "fake", "kv_cache_tokens": str(2**20)}
        server = LiveServer(checkpoint, Path(folder, "server"), has_gateway=True, **settings)
        try:
            server.start().wait_until_ready()
            server.wait_until_gateway_ready()
            asyncio.run(first_tokens(server, 20))  # warm
            first = asyncio.run(first_tokens(server, num_first))
            cells = []
            for num_streams in streams:
                grpc, gateway = [], []
                for _ in range(_REPEATS):
                    wait_until_idle(server, 60.0)
                    grpc.append(measure(server, num_streams, seconds)["tokens_per_s"])
                    wait_until_idle(server, 60.0)
                    gateway.append(gateway_speed(server, num_streams, seconds))
                cells.append({"streams": num_streams, "grpc_tokens_per_s": grpc, "gateway_tokens_per_s": gateway})
                print(cells[-1], file=sys.stderr, flush=True)
            server.stop()
        finally:
            server.kill_everything()
    return {"first_token_ms": first, "cells": cells}


def table(results: dict[str, Any]) -> str:
    """The gateway's README's table."""
    about = f"{results['machine']}, load {results['load_average_before']} before; commit {results['commit']}"
    return f"{gateway_table(results)}\n\n{about}; `{results['command']}`"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_gateway", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="requests at a time")
    parser.add_argument("--first-tokens", type=int, default=200, help="requests each way")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_gateway", sys.argv[1:] if argv is None else argv)
    about |= {"prompt_tokens": _PROMPT_TOKENS, "max_tokens": _MAX_TOKENS}
    results = about | measure_all(arguments.streams, arguments.seconds, arguments.first_tokens)
    print(table(results))
    if not arguments.no_results:
        write_results("gateway", results)
        before, begin, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{begin}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
