"""Answers on their way out: several calls merged, server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from client.gateway.errors import ApiError

T = TypeVar("T")
_DONE = b"data: [DONE]\n\n"


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams with the index of theirs, as they come; the first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]):
            async for item in streams[0]:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((index, item))
        except Exception as error:
            await items.put(error)
        await items.put(None)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_running = len(pumps)
    try:
        while num_running:
            found = await items.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                num_running -= 1
            else:
                yield found
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def unless_gone(request: Request, answering: Coroutine[Any, Any, T]) -> T:
    """Wait for an answer, or take it back and raise ApiError 499 when the client goes away meanwhile."""
    task = asyncio.create_task(answering)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client is gone", code="cancelled")
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    """Server-sent events that end in [DONE]; an error in the middle is an event of its own."""
    try:
        async for chunk in chunks:
            yield b"data: " + orjson.dumps(chunk) + b"\n\n"
    except ApiError as error:
        yield b"data: " + orjson.dumps(error.body()) + b"\n\n"
    yield _DONE


async def started(chunks: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same chunks, once the first one is there: an error before it can still be an HTTP status."""
    first = await anext(chunks)

    async def rest() -> AsyncGenerator[T, None]:
        yield first
        async for chunk in chunks:
            yield chunk

    return rest()


class EventStream(StreamingResponse):
    """A response of events. However it ends, `close` is awaited, so that what still runs is taken back at once."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()
