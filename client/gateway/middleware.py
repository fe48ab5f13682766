"""Around every request: its id, its log line, its counts, and a bound on its body."""

from __future__ import annotations

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.gateway.errors import ApiError
from client.gateway.logs import log
from client.gateway.metrics import Metrics
from client.gateway.record import Record, request_id_of

_QUIET_PATHS = ("/v1/health/", "/v1/metrics", "/page/")


class Watched:
    """Gives each request its Record as `scope["record"]`, and its id in the response's X-Request-Id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get("x-request-id"))
        record = scope["record"] = Record(request_id, scope["method"], scope["path"])
        is_complete = False

        async def sending(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        self._metrics.num_running.inc()
        try:
            await self._app(scope, receive, sending)
        finally:
            record.is_disconnected = record.status == 499 or not is_complete
            self._metrics.num_running.dec()
            self._metrics.observe(record, time.monotonic() - record.started_s)
            quiet = record.path.startswith(_QUIET_PATHS) and record.status < 500
            log.log(10 if quiet else 20, "request", extra={"fields": record.log_fields()})


class BoundedBody:
    """Refuses a body of more than `max_bytes`, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        length = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
        if length.isdigit() and int(length) > self._max_bytes:
            await self._too_large(f"{length} bytes").response()(scope, receive, send)
            return
        num_bytes = 0

        async def receiving() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large("more")
            return message

        await self._app(scope, receiving, send)

    def _too_large(self, found: str) -> ApiError:
        return ApiError(413, f"the body may have at most {self._max_bytes} bytes (max_body_bytes), got {found}")
