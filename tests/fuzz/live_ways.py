"""The ways into a live server, taken by clients that may send anything: raw HTTP, raw gRPC messages."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

import grpc
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.fuzz.damage import TEXTS, damaged_bytes
from tests.triton.calls import declared_inputs
from tests.triton.live_server import LiveServer

TIMEOUT_S = 90.0
"""No answer to a small request takes so long, however busy the machine is: then it hangs."""
_DATATYPES = (
    "BOOL",
    "UINT8",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
    "BF16",
    "",
    "X",
)
_TRITONS_OWN = (
    "failed to parse the request JSON buffer: ",
    "attempt to get members for non-object",
    "attempt to access JSON non-",
    "Unable to parse 'data': ",
    "Unable to parse JSON bytes array: ",
)
"""How the errors begin that server 2.51 itself answers with status 500, though they are the client's mistake."""
MOST_NESTED = 90_000
"""Brackets in JSON that server 2.51 bears: it dies of 105,000 in one another (`test_bad_clients.py` in tests/triton)."""
_CALLERS_MISTAKE = (
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED),
    grpc.StatusCode.OUT_OF_RANGE,
)


@dataclass(frozen=True)
class Answered:
    """Status and body of an HTTP response; status 0 when the server closed the connection without one."""

    status: int
    body: bytes


def exchange(port: int, request: bytes) -> Answered:
    """Send bytes to a port and read until the server closes or the response is whole; TimeoutError when neither comes."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            content = b"".join(iter(lambda: connection.recv(65536), b""))
        except (ConnectionResetError, BrokenPipeError):
            content = b""
    head, _, body = content.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Answered(int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, body)


def http_request(path: str, body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    """A POST that asks for the connection to be closed behind its answer."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


def check_triton(answered: Answered) -> None:
    """Triton's HTTP port: right, or the caller's mistake; 500 only for what it refuses itself before any model sees it."""
    if answered.status == 500:
        assert answered.body.startswith(tuple(b'{"error":"' + words.encode() for words in _TRITONS_OWN)), answered
    else:
        assert answered.status < 500, answered
    assert b"internal error" not in answered.body, answered


def check_gateway(answered: Answered) -> None:
    """The gateway: right, or an error in OpenAI's shape that says what is wrong; never its own failure."""
    assert answered.status < 500, answered
    if answered.status in (400, 404, 413):
        body = answered.body
        if not body.startswith(b"{"):
            return  # refused by the HTTP parser, before there is a request; or chunked
        assert json.loads(body)["error"]["message"], answered


class RawGrpc:
    """Sends messages that no client library would make."""

    def __init__(self, server: LiveServer) -> None:
        self._channel = grpc.insecure_channel(server.grpc_url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def infer(self, content: bytes) -> None:
        """One serialised ModelInferRequest and everything that comes of it: answers, or the caller's mistake."""
        request = service_pb2.ModelInferRequest.FromString(content)
        try:
            if request.model_name == "preprocessing":
                self._stub.ModelInfer(request, timeout=TIMEOUT_S)
                return
            for message in self._stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
                assert "internal error" not in message.error_message, message.error_message
                assert "Traceback" not in message.error_message, message.error_message
        except grpc.RpcError as error:
            if error.code() not in _CALLERS_MISTAKE:
                raise


@st.composite
def raw_requests(draw: st.DrawFn) -> bytes:
    """A serialised ModelInferRequest for one of the models: tensors of any name, datatype, shape and content."""
    model = draw(
        st.sampled_from(("ensemble", "ensemble", "mistral_nemo", "postprocessing", "preprocessing", "nothing"))
    )
    request = service_pb2.ModelInferRequest(model_name=model, id=draw(st.sampled_from(("", "a", "x" * 300, "é"))))
    known = declared_inputs(model) if model != "nothing" else {}
    if draw(st.booleans()) and known:
        first = {"postprocessing": "token_ids", "mistral_nemo": "prompt_token_ids"}.get(model, "text_input")
        _add(
            request,
            first,
            known[first],
            [1, 2],
            _content(draw, known[first], 2) if known[first] != "BYTES" else b"\1\0\0\0a" * 2,
        )
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(known) or ["x"])) if draw(st.integers(0, 9)) else draw(st.text(max_size=8))
        is_right = draw(st.integers(0, 4)) > 0
        datatype = known[name] if is_right and name in known else draw(st.sampled_from(_DATATYPES))
        count = draw(st.integers(0, 3)) if draw(st.booleans()) else 1
        shape = [1, count] if is_right else draw(st.lists(st.sampled_from((-1, 0, 1, 2, 2**31, 2**62)), max_size=4))
        _add(request, name, datatype, shape, _content(draw, datatype, count))
    for _ in range(draw(st.integers(0, 1))):
        request.parameters[
            draw(st.sampled_from(("max_tokens", "priority", "timeout", "x", "sequence_id", "é")))
        ].CopyFrom(service_pb2.InferParameter(int64_param=draw(st.integers(-(2**63), 2**63 - 1))))
    if draw(st.integers(0, 9)) == 0:
        request.outputs.add(name=draw(st.sampled_from(("text_output", "nothing", ""))))
    content: bytes = request.SerializeToString()
    return content


def _add(request: Any, name: str, datatype: str, shape: list[int], content: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(content)


def _content(draw: st.DrawFn, datatype: str, count: int) -> bytes:
    """`count` values of a datatype, some of them odd; or bytes that are no such values."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=40))
    if datatype == "BYTES":
        texts = [draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass")[:2000] for _ in range(count)]
        content = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        return content if draw(st.integers(0, 4)) else damaged_bytes(draw, content)
    width = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT64": 8, "UINT64": 8, "FP64": 8, "INT16": 2, "FP16": 2}.get(
        datatype, 4
    )
    return b"".join(
        draw(st.integers(0, 300) | st.integers(0, 2 ** (8 * width) - 1)).to_bytes(8, "little")[:width]
        for _ in range(count)
    )
