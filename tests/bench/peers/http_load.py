"""Load on llama.cpp's server: the closed loop of `client.load`, over HTTP with server-sent events.

    python -m tests.bench.peers.http_load URL NUM_STREAMS SECONDS NUM_PROMPT_TOKENS MAX_TOKENS

Prints the report as one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys
from urllib.parse import urlsplit

from client.load_report import LoadReport
from tests.bench.peers.closed_loop import closed_loop


async def request(host: str, port: int, body: dict[str, object], report: LoadReport) -> None:
    """One completion on a connection of its own; RuntimeError when it is not whole."""
    loop = asyncio.get_running_loop()
    last_s, num_tokens, is_whole = loop.time(), 0, False
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"POST /completion HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            # An event has several tokens where one alone is no whole character.
            if (num_new := event["tokens_predicted"] - num_tokens) > 0:
                report.add_response(num_new, loop.time() - last_s, is_first=not num_tokens)
                last_s, num_tokens = loop.time(), num_tokens + num_new
            is_whole = event["stop"]
    finally:
        writer.close()
    if not is_whole:
        raise RuntimeError(f"the stream ended after {num_tokens} tokens")


async def main(url: str, num_streams: int, seconds: float, num_prompt_tokens: int, max_tokens: int) -> int:
    """Run the loop and print the report."""
    address = urlsplit(url)

    async def ask(prompt: list[int], report: LoadReport) -> None:
        body = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        await request(str(address.hostname), int(address.port or 80), body, report)

    report = await closed_loop(ask, num_streams, seconds, num_prompt_tokens)
    print(report.as_json())
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
