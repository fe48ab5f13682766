"""What Triton's path adds to the time to the first token, with nothing else running.

    python -m tests.bench.bench_first_token [--requests 300]

The same request by three ways, one at a time: to the engine's process alone, to the model `mistral_nemo` over gRPC, and to the
whole ensemble over gRPC. The device costs nothing, so what is left is the host's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backend.engine import messages
from backend.engine.engine_process import EngineProcess
from backend.engine.request import GenerationRequest
from backend.settings import Settings
from client.load_report import percentile_ms
from tests.bench.conditions import conditions, write_results
from tests.bench.tables import first_token_table
from tests.checkpoints import make_checkpoint
from tests.triton.calls import grpc_stream
from tests.triton.live_server import LiveServer

_PROMPT = tuple(range(1100, 1164))
_MAX_TOKENS = 4
_WARM_UP = 30
_TIMEOUT_S = 10.0


class EngineAlone:
    """The engine's process without Triton."""

    def __init__(self, checkpoint: Path) -> None:
        self._first, self._end = threading.Event(), threading.Event()
        self._handle = 0
        settings = Settings(checkpoint=str(checkpoint), runner="fake", kv_cache_tokens=2**20)
        self.process = EngineProcess(settings, self._on_step, print)
        self.process.start(lambda _: None)

    def _on_step(self, step: messages.Step) -> None:
        if step.tokens:
            self._first.set()
        if any(event.finish is not None for event in step.tokens):
            self._end.set()

    def first_token_s(self) -> float:
        """Seconds from submission to the first token."""
        self._handle += 1
        self._first.clear()
        self._end.clear()
        started_s = time.perf_counter()
        self.process.submit(GenerationRequest(self._handle, "", _PROMPT, _MAX_TOKENS, ignore_eos=True, stream=True))
        assert self._first.wait(_TIMEOUT_S)
        first_s = time.perf_counter() - started_s
        assert self._end.wait(_TIMEOUT_S)
        return first_s


def measure(name: str, first_token_s: Callable[[], float], num_requests: int) -> dict[str, Any]:
    """Percentiles of one way."""
    times_s = [first_token_s() for _ in range(_WARM_UP + num_requests)][_WARM_UP:]
    cell = {"way": name} | {f"p{percent}_ms": percentile_ms(times_s, percent) for percent in (50, 90, 99)}
    print(cell, file=sys.stderr, flush=True)
    return cell


def measure_all(num_requests: int) -> list[dict[str, Any]]:
    """All three ways."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_size": 96, "vocab_size": 4096}
        checkpoint = make_checkpoint(folder / "checkpoint", has_tekken=True, **sizes)
        alone = EngineAlone(checkpoint)
        cells = [measure("engine alone", alone.first_token_s, num_requests)]
        alone.process.close()
        settings: dict[str, Any] = {"runner": "fake", "kv_cache_tokens": str(2**20)}
        server = LiveServer(checkpoint, folder / "server", **settings)
        stack.callback(server.kill_everything)
        server.start().wait_until_ready()
        with grpc_stream(server) as stream:
            for model in ("mistral_nemo", "ensemble"):

                def first_token_s(model: str = model) -> float:
                    started_s = time.perf_counter()
                    values: dict[str, Any] = {
                        "prompt_token_ids": _PROMPT,
                        "max_tokens": _MAX_TOKENS,
                        "ignore_eos": True,
                        "stream": True,
                    }
                    stream.send(model, **values)
                    is_final = stream.next().is_final
                    first_s = time.perf_counter() - started_s
                    while not is_final:
                        is_final = stream.next().is_final
                    return first_s

                cells.append(measure(f"{model} over gRPC", first_token_s, num_requests))
        server.stop()
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and keep it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_first_token", allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=300, help="of each way")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    results = conditions("tests.bench.bench_first_token", sys.argv[1:] if argv is None else argv)
    results["cells"] = measure_all(arguments.requests)
    print(first_token_table(results))
    if not arguments.no_results:
        write_results("first_token", results)


if __name__ == "__main__":
    main()
