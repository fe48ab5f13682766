"""A real tritonserver, as an operator starts it, and requests to one of its models over gRPC streams."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from tritonclient.grpc.aio import InferenceServerClient

from client.params import GenerationParams, InputTensor
from client.token_stream import stream_token_counts
from tests.bench.serving.way import Progress, ProgressQueue, ServingError
from tests.triton.live_server import LiveServer
from tests.triton.metrics import read_metrics, wait_until_idle

_READY_TIMEOUT_S = 180.0
_IDLE_TIMEOUT_S = 60.0


class TritonWay:
    """Requests to `model` of a running server, each on a stream of its own, all on one channel and one event loop."""

    def __init__(self, server: LiveServer, model: str) -> None:
        self._server = server
        self._model = model
        self._queue = ProgressQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        self._client = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Prompt tokens that the prefix cache has had so far."""
        return int(read_metrics(self._server)["nemo_prefix_hit_tokens_total"])

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Begin one."""
        self._loop.call_soon_threadsafe(self._begin, handle, prompt, max_tokens)

    def take_back(self, handle: int) -> None:
        """Cancel its stream."""
        self._loop.call_soon_threadsafe(self._cancel, handle)

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        """What came on all streams."""
        return self._queue.take(timeout_s)

    def wait_until_idle(self) -> None:
        """Until the engine has nothing to do, which its metrics say."""
        wait_until_idle(self._server, _IDLE_TIMEOUT_S)

    def close(self) -> None:
        """End the client; the server goes on."""
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(self) -> InferenceServerClient:
        return InferenceServerClient(self._server.grpc_url)

    async def _disconnect(self) -> None:
        for task in (tasks := list(self._tasks.values())):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _begin(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        self._tasks[handle] = self._loop.create_task(self._request(handle, prompt, max_tokens))

    def _cancel(self, handle: int) -> None:
        if (task := self._tasks.get(handle)) is not None:
            task.cancel()

    async def _request(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        params = GenerationParams(max_tokens=max_tokens, temperature=1.0, seed=handle, ignore_eos=True)
        tensors = (InputTensor("prompt_token_ids", "INT32", prompt), *params.tensors())
        num_left = max_tokens
        try:
            async with aclosing(stream_token_counts(self._client, self._model, tensors)) as counts:
                async for num_tokens in counts:
                    num_left -= num_tokens
                    self._queue.put((Progress(handle, num_tokens, time.perf_counter(), num_left == 0),))
            if num_left:
                raise ServingError(f"{self._model} gave {max_tokens - num_left} of {max_tokens} tokens")
        except Exception as error:  # whatever it is, the load is to stop and say so
            self._queue.put(ServingError(f"{type(error).__name__}: {error}"))
        finally:
            del self._tasks[handle]


@contextmanager
def running_server(
    checkpoint: Path, folder: Path, settings: dict[str, str], triton: Path | None
) -> Iterator[LiveServer]:
    """A server that is ready; `triton` is a folder with the contents of nvidia-pytriton's wheel, None: as the project finds it.

    ServingError with the end of its log when it does not get ready.
    """
    variables: dict[str, Any] = dict(settings)
    server = LiveServer(checkpoint, folder, **variables)
    if triton is not None:
        server.environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(triton.absolute()), server.environment.get("PYTHONPATH")))
        )
    try:
        try:
            server.start().wait_until_ready(_READY_TIMEOUT_S)
        except AssertionError as error:
            raise ServingError(f"tritonserver: {str(error)[-2000:]}") from error
        yield server
        server.stop()
    finally:
        server.kill_everything()


def prepare_wheel(folder: Path) -> None:
    """Make the programs in an unpacked wheel executable, as pip would; ServingError when it is no such wheel."""
    root = folder / "pytriton" / "tritonserver"
    if not (root / "bin" / "tritonserver").exists():
        raise ServingError(f"{folder} holds no nvidia-pytriton: {root / 'bin' / 'tritonserver'} is missing")
    for program in (root / "bin" / "tritonserver", *root.glob("python_backend_stubs/*/triton_python_backend_stub")):
        with contextlib.suppress(PermissionError):  # somebody else's, and then hopefully executable
            program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
