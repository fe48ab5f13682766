"""`python -m client.load`: keeps a number of streams busy and measures what the server gives.

A closed loop: each of `--streams` workers sends its next request when the last one has ended. Prompts are random token
ids, so no tokenizer is needed. Everything runs on one event loop and one gRPC channel and reads raw tensors, because
the load generator usually shares its cores with the server; `client_cpu_us_per_response` says what it took itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
import grpc.aio  # type: ignore[import-untyped,unused-ignore]
from tritonclient.grpc.aio import InferenceServerClient  # type: ignore[import-untyped,unused-ignore]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped,unused-ignore]

from client.client import host_and_port
from client.errors import ClientError, RequestFailed, ServerUnreachable
from client.load_report import LoadReport
from client.params import GenerationParams, InputTensor
from client.terminal import EXIT_FAILED, EXIT_INTERRUPTED, exit_code
from client.token_stream import stream_token_counts

_READY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LoadPlan:
    """What to send: `num_requests` in all, `num_streams` at a time, for at most `max_seconds`.

    Prompts have `num_prompt_tokens` ids from `first_id` to `last_id`; the same `seed` makes the same prompts, whatever
    the number of streams. `params` holds for every request.
    """

    url: str | None
    model: str
    num_streams: int
    num_requests: int
    num_prompt_tokens: int
    max_seconds: float
    first_id: int
    last_id: int
    seed: int
    params: GenerationParams

    def prompt(self, index: int) -> tuple[int, ...]:
        """The token ids of request number `index`."""
        generator = random.Random(f"{self.seed}/{index}")
        return tuple(generator.choices(range(self.first_id, self.last_id + 1), k=self.num_prompt_tokens))


class LoadRun:
    """One run of a plan; `report` is true at any moment."""

    def __init__(self, plan: LoadPlan) -> None:
        self.report = LoadReport(num_streams=plan.num_streams, num_prompt_tokens=plan.num_prompt_tokens)
        self.stop = asyncio.Event()
        self._plan = plan
        self._num_started = 0

    async def run(self, *, progress: bool) -> None:
        """Sends everything, until done, out of time or stopped.

        Raises ServerUnreachable when nobody listens, RequestFailed when the model is not ready.
        """
        address = host_and_port(self._plan.url, "grpc")
        async with InferenceServerClient(address) as client:
            await self._check_ready(client, address)
            self.report.start()
            workers = [asyncio.create_task(self._work(client)) for _ in range(self._plan.num_streams)]
            stopped = asyncio.create_task(self.stop.wait())
            helpers: list[asyncio.Task[Any]] = [stopped]
            if progress:
                helpers.append(asyncio.create_task(self._print_progress()))
            all_done = asyncio.create_task(asyncio.wait(workers))
            helpers.append(all_done)
            await asyncio.wait({all_done, stopped}, timeout=self._plan.max_seconds, return_when="FIRST_COMPLETED")
            self.report.end()
            for task in (*workers, *helpers):
                task.cancel()
            for outcome in await asyncio.gather(*workers, return_exceptions=True):
                # An error that is not a request's own is a mistake of this program: let it be seen.
                if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                    raise outcome
            self.report.num_unfinished = self._num_started - self.report.num_done - self.report.num_failed

    async def _check_ready(self, client: Any, address: str) -> None:
        try:
            is_ready = await client.is_model_ready(self._plan.model, client_timeout=_READY_TIMEOUT_S)
        except InferenceServerException as error:
            raise ServerUnreachable(address, error.message()) from error
        if not is_ready:
            raise RequestFailed(f"the model {self._plan.model} at {address} is not ready")

    async def _work(self, client: Any) -> None:
        while self._num_started < self._plan.num_requests:
            index = self._num_started
            self._num_started += 1
            try:
                await self._request(client, index)
            except (ClientError, InferenceServerException, grpc.RpcError) as error:
                self.report.add_failure(_kind(error))
            else:
                self.report.num_done += 1

    async def _request(self, client: Any, index: int) -> None:
        tensors = (InputTensor("prompt_token_ids", "INT32", self._plan.prompt(index)), *self._plan.params.tensors())
        started_s = last_s = time.perf_counter()
        is_first = True
        async with contextlib.aclosing(stream_token_counts(client, self._plan.model, tensors)) as counts:
            async for num_ids in counts:
                now_s = time.perf_counter()
                self.report.add_response(num_ids, now_s - (started_s if is_first else last_s), is_first)
                is_first, last_s = False, now_s

    async def _print_progress(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            print(self.report.progress(self._plan.num_requests), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 0 when every request that was sent came back whole."""
    parser = argparse.ArgumentParser(
        prog="python -m client.load", description="Load the server and measure it.", allow_abbrev=False
    )
    parser.add_argument("--url", metavar="HOST:PORT", help="default: localhost:8001")
    parser.add_argument("--protocol", choices=("grpc",), default="grpc", help="gRPC only: HTTP has no asyncio client")
    parser.add_argument("--model", default="ensemble")
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="requests at a time")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="requests in all")
    parser.add_argument("--max-seconds", type=float, default=600.0, metavar="SECONDS", help="cancel what is left then")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--ids", default="1000-3999", metavar="FIRST-LAST", help="range of the random prompt ids")
    parser.add_argument("--stop-at-eos", action="store_true", help="else every answer has --max-tokens tokens")
    parser.add_argument("--temperature", type=float, metavar="X", help="default: greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts, and of sampling")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    arguments = parser.parse_args(argv)
    first_id, _, last_id = arguments.ids.partition("-")
    for name in ("streams", "requests", "prompt_tokens", "max_tokens", "max_seconds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: more than 0 is wanted, not {getattr(arguments, name)}")
    if not (first_id.isdecimal() and last_id.isdecimal() and int(first_id) <= int(last_id)):
        parser.error(f"--ids: FIRST-LAST is wanted, not {arguments.ids!r}")
    try:
        host_and_port(arguments.url, "grpc")
    except ValueError as error:
        parser.error(str(error))
    plan = LoadPlan(
        url=arguments.url,
        model=arguments.model,
        num_streams=arguments.streams,
        num_requests=arguments.requests,
        num_prompt_tokens=arguments.prompt_tokens,
        max_seconds=arguments.max_seconds,
        first_id=int(first_id),
        last_id=int(last_id),
        seed=arguments.seed,
        params=GenerationParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed if arguments.temperature else None,
            ignore_eos=None if arguments.stop_at_eos else True,
        ),
    )
    return exit_code(lambda: asyncio.run(_main(plan, as_json=arguments.json, progress=not arguments.quiet)))


async def _main(plan: LoadPlan, *, as_json: bool, progress: bool) -> int:
    run = LoadRun(plan)
    with contextlib.suppress(NotImplementedError):  # Windows has no signal handlers in its event loop
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, run.stop.set)
    await run.run(progress=progress)
    print(run.report.as_json() if as_json else run.report.as_table())
    if run.stop.is_set():
        return EXIT_INTERRUPTED
    return EXIT_FAILED if run.report.num_failed or not run.report.num_done else 0


def _kind(error: Exception) -> str:
    """A short name under which equal errors are counted; numbers differ between requests and are left out."""
    if isinstance(error, InferenceServerException):
        text = f"{error.status() or ''} {error.message()}"
    elif isinstance(error, grpc.aio.AioRpcError):
        text = f"{error.code().name} {error.details()}"
    else:
        text = str(error)
    return "".join("#" if character.isdigit() else character for character in " ".join(text.split()))[:100]


if __name__ == "__main__":
    sys.exit(main())
