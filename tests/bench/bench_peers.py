"""The serving path beside what one would use instead, on this machine, in one run: tokens per second, first token, memory.

    make bench-peers, or python -m tests.bench.bench_peers [--seconds 5] [--streams 1 4 16 64 256]

Two engines behind the paths. One that costs nothing (`runner` = `fake`), so that the path alone is seen: our ensemble; the same
with a token a response; one Python model that does everything, as vLLM's backend does it (peers/one_model.py, on the same
tritonserver, same engine code). And the demo checkpoint in FP32 on one thread: our ensemble, the one model, transformers'
continuous batching (in its own process, without any network), llama.cpp's server over HTTP.

Before anything is timed each path with real weights must give the demo's own answers. Closed loop of random prompts of 64 ids,
128 ids each; memory is that of all processes of the path, shared pages counted once, after each cell. The client shares the
cores. Writes results/peers.json and results/peers.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import Client, GenerationParams
from tests.bench.conditions import PROJECT, RESULTS, conditions, write_results
from tests.bench.load_report import client_load, read_report, run_load
from tests.bench.peers.gguf_file import write_gguf
from tests.bench.peers.one_model_server import MODEL as ONE_MODEL
from tests.bench.peers.one_model_server import OneModelServer
from tests.bench.peers.processes import PeerProcess, memory_mb
from tests.bench.tables import peers_table
from tests.demo.conversation import EOS_ID, ChatTokens
from tests.demo.evaluate import CHECKPOINT
from tests.demo.questions import read_data
from tests.triton.live_server import LiveServer

_PROMPT_TOKENS = 64
_MAX_TOKENS = 128
_NUM_QUESTIONS = 5
_NUM_THREADS = 1
_PEERS = Path(__file__).with_name("peers")
Cells = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """What every way of serving is given."""

    streams: Sequence[int]
    seconds: float
    folder: Path
    peers_python: Path
    prompts: list[list[int]]
    answers: list[str]

    def new_folder(self, name: str) -> Path:
        """One that is not there yet; its path has no blanks, which Triton's Python backend does not bear."""
        return self.folder / f"{name}-{len(list(self.folder.iterdir()))}"

    def settings(self, engine: str) -> dict[str, Any]:
        """Of our own engine."""
        num_tokens = max(self.streams) * (_PROMPT_TOKENS + _MAX_TOKENS + 64)
        settings = {"kv_cache_tokens": str(max(num_tokens, 8192)), "num_threads": str(_NUM_THREADS)}
        return settings | ({"runner": "fake"} if engine == "free engine" else {"weight_dtype": "fp32"})

    def check(self, way: str, texts: Sequence[str]) -> None:
        """RuntimeError when a path gives other answers than the demo's."""
        for text, answer in zip(texts, self.answers, strict=True):
            if text != answer:
                raise RuntimeError(f"{way} answers {text!r} where {answer!r} is right")


def grpc_cells(bench: Bench, way: str, engine: str, url: str, model: str, pids: Callable[[], list[int]]) -> Cells:
    """Cells of a model on a tritonserver, by `client.load`."""
    if engine != "free engine":
        with Client(url, model=model) as client:
            params = GenerationParams(max_tokens=160)
            answers = (client.generate(params=params, prompt_token_ids=ids) for ids in bench.prompts)
            bench.check(way, ["".join(response.text for response in responses) for responses in answers])
    for num_streams in bench.streams:
        load = client_load(
            url, num_streams, bench.seconds, _PROMPT_TOKENS, _MAX_TOKENS, "--model", model, "--seed", num_streams
        )
        yield load | {"memory_mb": memory_mb(pids())}


def ensemble(bench: Bench, way: str, engine: str, **settings: str) -> Cells:
    """Our ensemble."""
    server = LiveServer(CHECKPOINT, bench.new_folder("ensemble"), **(bench.settings(engine) | settings))
    try:
        server.start().wait_until_ready()
        yield from grpc_cells(bench, way, engine, server.grpc_url, "ensemble", server.pids)
        server.stop()
    finally:
        server.kill_everything()


def one_model(bench: Bench, way: str, engine: str) -> Cells:
    """One Python model that does everything."""
    server = OneModelServer(CHECKPOINT, bench.new_folder("one-model"), **bench.settings(engine))
    try:
        server.wait_until_ready()
        yield from grpc_cells(bench, way, engine, server.grpc_url, ONE_MODEL, server.pids)
    finally:
        server.end()


@contextmanager
def peer(command: Sequence[str], log_path: Path) -> Iterator[PeerProcess]:
    """A process whose standard output is read."""
    process = PeerProcess(command, log_path, is_read=True)
    try:
        yield process
    finally:
        process.end()


def transformers(bench: Bench, way: str, engine: str) -> Cells:
    """transformers' continuous batching."""
    job = {
        "checkpoint": str(CHECKPOINT), "prompts": bench.prompts, "streams": list(bench.streams), "seconds": bench.seconds,
        "num_prompt_tokens": _PROMPT_TOKENS, "max_tokens": _MAX_TOKENS, "num_threads": _NUM_THREADS, "end_id": EOS_ID,
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.bench.peers.continuous_batching", json.dumps(job)]
    with peer(command, bench.folder / "transformers.txt") as process:
        tokens = ChatTokens(CHECKPOINT / "tekken.json")
        bench.check(way, [tokens.decode([i for i in ids if i != EOS_ID]) for ids in json.loads(process.read_line())])
        for _ in bench.streams:
            yield read_report(process.read_line()) | {"memory_mb": memory_mb(process.pids())}


def llama_cpp(bench: Bench, way: str, engine: str) -> Cells:
    """llama.cpp's server."""
    model = bench.folder / "demo.gguf"
    write_gguf(CHECKPOINT, model)
    sizes = (max(bench.streams), _PROMPT_TOKENS + _MAX_TOKENS + 64, _NUM_THREADS)
    command = [str(bench.peers_python), str(_PEERS / "llama_server.py"), str(model), *map(str, sizes)]
    with peer(command, bench.folder / "llama.txt") as process:
        url = process.read_line()
        bench.check(way, [_llama_answer(url, ids) for ids in bench.prompts])
        for num_streams in bench.streams:
            arguments = (url, num_streams, bench.seconds, _PROMPT_TOKENS, _MAX_TOKENS)
            report = run_load("tests.bench.peers.http_load", arguments, bench.seconds)
            yield report | {"memory_mb": memory_mb(process.pids())}


def _llama_answer(url: str, ids: list[int]) -> str:
    body = json.dumps({"prompt": ids, "n_predict": 160, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["content"])


WAYS: dict[tuple[str, str], Callable[[Bench, str, str], Cells]] = {
    ("free engine", "ours"): ensemble,
    ("free engine", "ours, a token a response"): lambda *given: ensemble(*given, max_tokens_per_response="1"),
    ("free engine", "one Python model"): one_model,
    ("demo weights", "ours"): ensemble,
    ("demo weights", "one Python model"): one_model,
    ("demo weights", "transformers"): transformers,
    ("demo weights", "llama.cpp"): llama_cpp,
}
"""By engine and name; the first of each engine is what the others are compared with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_peers", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each cell")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="requests at a time")
    parser.add_argument("--ways", nargs="+", default=list(dict.fromkeys(way for _, way in WAYS)), help="only these")
    parser.add_argument("--peers-python", type=Path, default=PROJECT / ".venv-peers/bin/python")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_peers", sys.argv[1:] if argv is None else argv)
    about |= {"seconds_per_cell": arguments.seconds, "prompt_tokens": _PROMPT_TOKENS, "max_tokens": _MAX_TOKENS}
    questions, tokens = read_data().languages[0].questions[:_NUM_QUESTIONS], ChatTokens(CHECKPOINT / "tekken.json")
    prompts = [list(tokens.prompt([], question.ask[0])) for question in questions]
    cells = []
    with tempfile.TemporaryDirectory() as name:
        answers = [question.answer for question in questions]
        bench = Bench(
            arguments.streams, arguments.seconds, Path(name), arguments.peers_python.absolute(), prompts, answers
        )
        for (engine, way), cells_of in WAYS.items():
            if way not in arguments.ways:
                continue
            for num_streams, cell in zip(arguments.streams, cells_of(bench, way, engine), strict=True):
                cells.append({"engine": engine, "way": way} | cell | {"streams": num_streams})
                print(
                    f"{engine}, {way}, {num_streams} streams: {cell['tokens_per_s']:,.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    results = about | {"cells": cells}
    print(peers_table(results))
    if not arguments.no_results:
        write_results("peers", results)
        plot = [
            str(bench.peers_python),
            str(_PEERS / "plot.py"),
            str(RESULTS / "peers.json"),
            str(RESULTS / "peers.png"),
        ]
        subprocess.run(plot, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
