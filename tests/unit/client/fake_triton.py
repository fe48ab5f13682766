"""A server that speaks Triton's two protocols and answers with a script: gRPC ModelStreamInfer and ModelInfer, and
generate_stream.

It plays what the real one does on the wire: the last response carries the final flag itself, an error may come at any
place of a stream, a cancelled stream is noticed by the server, JSON shows a tensor of one element as a scalar.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
from tritonclient.grpc import service_pb2, service_pb2_grpc  # type: ignore[import-untyped,unused-ignore]

_STRUCT_CODES = {"INT32": "i", "UINT64": "Q", "FP32": "f", "BOOL": "?"}
_TEXTS = ("text_output", "finish_reason", "stop_reason", "top_log_probs", "prompt_log_probs")
_OUTPUT_DATATYPES = dict.fromkeys(_TEXTS, "BYTES")  # all others INT32
_TICK_S = 0.01


@dataclass(frozen=True)
class Reply:
    """One response; `final` puts the final flag on it."""

    outputs: Mapping[str, list[Any]]
    final: bool = False


@dataclass(frozen=True)
class Failure:
    """The request ends with this error; with a status the call does."""

    message: str
    status: grpc.StatusCode | None = None


@dataclass(frozen=True)
class Pause:
    """Nothing for so long."""

    seconds: float


@dataclass(frozen=True)
class Drop:
    """The connection breaks."""


@dataclass(frozen=True)
class EarlyEnd:
    """The stream ends in good order, but before the answer has."""


Step = Reply | Failure | Pause | Drop | EarlyEnd


@dataclass(frozen=True)
class Received:
    """A request as it arrived: id, and inputs by name as (datatype, shape, values); over HTTP the bare JSON values."""

    model: str
    request_id: str
    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def values(self, name: str) -> list[Any]:
        """The values of one input, whatever the protocol."""
        value = self.inputs[name]
        if isinstance(value, tuple):
            return list(value[2])
        return value if isinstance(value, list) else [value]


Script = Callable[[Received], Iterable[Step]]


class FakeTriton:
    """Both servers on free loopback ports; `received` and `cancelled` tell what happened."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.ready = True
        self.http_closes = False  # as a proxy may do: one connection, one request
        self.received: list[Received] = []
        self.cancelled = threading.Event()
        self._grpc = grpc.server(ThreadPoolExecutor(max_workers=32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._grpc)
        self.grpc_address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.http_address = f"127.0.0.1:{self._http.server_address[1]}"
        self._http_thread = threading.Thread(target=self._http.serve_forever, args=(_TICK_S,), daemon=True)

    def __enter__(self) -> FakeTriton:
        self._grpc.start()
        self._http_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(grace=None).wait()

    def address(self, protocol: str) -> str:
        return self.grpc_address if protocol == "grpc" else self.http_address

    def steps(self, received: Received, is_alive: Callable[[], bool]) -> Iterator[Step]:
        """The script, its pauses spent here; ends when the client has gone."""
        self.received.append(received)
        for step in self.script(received):
            if isinstance(step, Pause):
                until_s = time.monotonic() + step.seconds
                while time.monotonic() < until_s and is_alive():
                    time.sleep(_TICK_S)
            if not is_alive():
                self.cancelled.set()
                return
            if not isinstance(step, Pause):
                yield step


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc,unused-ignore]
    def __init__(self, fake: FakeTriton) -> None:
        self._fake = fake

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self._fake.ready and request.name == "ensemble")

    def ModelInfer(self, request: Any, context: Any) -> Any:
        """One request, one response: the first of the script."""
        for step in self._fake.steps(_received(request), context.is_active):
            if isinstance(step, Failure):
                context.abort(step.status or grpc.StatusCode.INTERNAL, step.message)
            if isinstance(step, Reply):
                return _grpc_reply(step).infer_response
        return context.abort(grpc.StatusCode.INTERNAL, "the script has no reply")

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        ended = threading.Event()
        # grpc does not resume this generator once the client has gone, so the script alone might not see it.
        context.add_callback(lambda: None if ended.is_set() else self._fake.cancelled.set())
        yield from self._responses(requests, context)
        ended.set()

    def _responses(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            for step in self._fake.steps(_received(request), context.is_active):
                if isinstance(step, Drop):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                if isinstance(step, EarlyEnd):
                    return
                if isinstance(step, Failure) and step.status is not None:
                    context.abort(step.status, step.message)
                if isinstance(step, Failure):
                    yield service_pb2.ModelStreamInferResponse(error_message=step.message)
                if isinstance(step, Reply):
                    yield _grpc_reply(step)


def _received(request: Any) -> Received:
    inputs = {
        tensor.name: (tensor.datatype, tuple(tensor.shape), _unpack(tensor.datatype, raw))
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    parameters = {name: value.bool_param for name, value in request.parameters.items()}
    return Received(request.model_name, request.id, inputs, parameters)


def _grpc_reply(reply: Reply) -> Any:
    response = service_pb2.ModelInferResponse(model_name="ensemble")
    response.parameters["triton_final_response"].bool_param = reply.final
    for name, values in reply.outputs.items():
        datatype = _OUTPUT_DATATYPES.get(name, "INT32")
        response.outputs.add(name=name, datatype=datatype, shape=(1, len(values)))
        response.raw_output_contents.append(_pack(datatype, values))
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def _handler(fake: FakeTriton) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._plain(200 if fake.ready and self.path == "/v2/models/ensemble/ready" else 400, b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model = self.path.split("/")[3]
            received = Received(model, body.pop("id", ""), body, {"path": self.path})
            if model == "other":
                self._plain(404, b'{"error":"Request for unknown model: \'other\' is not found"}')
                return
            if model == "behind%20a%20proxy":
                self._plain(502, b"<html>bad gateway</html>")
                return
            started = False
            self.connection.setblocking(True)
            for step in fake.steps(received, self._is_connected):
                if isinstance(step, Failure) and not started:
                    self._plain(400, f"data: {json.dumps({'error': step.message})}\n\n".encode())
                    return
                if isinstance(step, Drop):
                    self.close_connection = True
                    return
                if isinstance(step, EarlyEnd):
                    break
                if not started:
                    started = True
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                    self.send_header("Transfer-Encoding", "chunked")
                    if fake.http_closes:
                        self.send_header("Connection", "close")
                    self.end_headers()
                event = {"error": step.message} if isinstance(step, Failure) else _json_reply(step)
                self._chunks(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
            if started:
                self.wfile.write(b"0\r\n\r\n")

        def _chunks(self, data: bytes) -> None:
            """Writes `data` in two chunks cut in its middle, wherever that is."""
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()

        def _plain(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _is_connected(self) -> bool:
            self.connection.setblocking(False)
            try:
                return bool(self.connection.recv(1))
            except BlockingIOError:
                return True
            except OSError:
                return False
            finally:
                self.connection.setblocking(True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _json_reply(step: Step) -> dict[str, Any]:
    assert isinstance(step, Reply)
    values = {name: value[0] if len(value) == 1 else value for name, value in step.outputs.items()}
    return {"model_name": "ensemble", "model_version": "1", **values}


def _pack(datatype: str, values: list[Any]) -> bytes:
    if datatype == "BYTES":
        encoded = [value if isinstance(value, bytes) else str(value).encode() for value in values]
        return b"".join(struct.pack("<I", len(data)) + data for data in encoded)
    return struct.pack(f"<{len(values)}{_STRUCT_CODES[datatype]}", *values)


def _unpack(datatype: str, raw: bytes) -> list[Any]:
    if datatype != "BYTES":
        return [value for (value,) in struct.iter_unpack(f"<{_STRUCT_CODES[datatype]}", raw)]
    strings = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        strings.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return strings
