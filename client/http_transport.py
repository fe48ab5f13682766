"""Requests over HTTP: POST /v2/models/<model>/generate_stream, answered by server-sent events.

Needs the standard library only.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import quote

from client.errors import BrokenStream, RequestFailed, ServerUnreachable, TimedOut
from client.params import InputTensor
from client.response import Response
from client.sse import EventParser

_READ_BYTES = 65536
_CONNECT_TIMEOUT_S = 20.0


class HttpTransport:
    """One connection per request, so that it may be used from several threads and closing one cancels only its own."""

    def __init__(self, address: str, timeout_s: float | None) -> None:
        self._address = address
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server says that `model` is ready; False also when nobody listens."""
        connection = http.client.HTTPConnection(self._address, timeout=timeout_s)
        try:
            connection.request("GET", f"/v2/models/{quote(model, safe='')}/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stream(
        self, model: str, tensors: Sequence[InputTensor], request_id: str, num_sequences: int
    ) -> Generator[Response, None, None]:
        """Sends one request and yields its responses; closing the generator early drops the connection.

        HTTP has no final flag: the answer is complete when `num_sequences` responses had a finish reason.
        """
        body: dict[str, Any] = {tensor.name: tensor.json_value() for tensor in tensors}
        if request_id:
            body["id"] = request_id
        num_finished = 0
        with closing(self._events(f"/v2/models/{quote(model, safe='')}/generate_stream", body)) as events:
            for event in events:
                response = Response.from_json(event)
                num_finished += bool(response.finish_reason)
                yield response
        if num_finished < num_sequences:
            raise BrokenStream(f"the stream ended with {num_finished} of {num_sequences} sequences finished")

    def _events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        connection = http.client.HTTPConnection(self._address, timeout=min(_CONNECT_TIMEOUT_S, _left(deadline)))
        reply: http.client.HTTPResponse | None = None
        try:
            try:
                connection.connect()
            except OSError as error:
                raise ServerUnreachable(self._address, str(error)) from error
            # NOTE: kept, because a reply without a length takes the socket over and `connection.sock` becomes None.
            sock = connection.sock
            sock.settimeout(None if deadline is None else _left(deadline))
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != http.HTTPStatus.OK:
                raise RequestFailed(_error_text(reply.status, reply.read()))
            parser = EventParser()
            while chunk := reply.read1(_READ_BYTES):
                for data in parser.feed(chunk):
                    yield _event(data)
                if deadline is not None:
                    sock.settimeout(_left(deadline))
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            if isinstance(error, TimeoutError) and self._timeout_s is not None:
                raise TimedOut(self._timeout_s) from error
            cause = str(error) or type(error).__name__
            raise BrokenStream(f"the connection to {self._address} broke: {cause}") from error
        finally:
            if reply is not None:
                reply.close()
            connection.close()


def _left(deadline: float | None) -> float:
    """Seconds until `deadline`; never 0, which would make a socket non-blocking."""
    return float("inf") if deadline is None else max(deadline - time.monotonic(), 1e-3)


def _event(data: str) -> dict[str, Any]:
    """The JSON object of one event; raises RequestFailed when it is the server's error."""
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BrokenStream(f"the server sent an event that is not JSON: {data!r:.120}") from error
    if not isinstance(event, dict):
        raise BrokenStream(f"the server sent an event that is no JSON object: {data!r:.120}")
    if "error" in event:
        raise RequestFailed(str(event["error"]))
    return event


def _error_text(status: int, body: bytes) -> str:
    """The message of an error reply: Triton's is {"error": "..."}, bare or as an event; a proxy's is anything."""
    text = body.decode(errors="replace")
    try:
        return str(json.loads(text.removeprefix("data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {text:.200}"
