"""Requests over KServe's gRPC protocol: one bidirectional stream per request.

NOTE: this drives the stub that tritonclient generates, not its InferenceServerClient: that one carries a single stream
per object, hands responses to a callback on a thread of its own, and does not tell when a stream ends without its
final response. grpc comes with tritonclient[grpc].
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
from tritonclient.grpc import service_pb2, service_pb2_grpc  # type: ignore[import-untyped,unused-ignore]

from client.errors import BrokenStream, ClientError, RequestFailed, ServerUnreachable, TimedOut
from client.params import InputTensor
from client.response import Response

# How gRPC core words a connection that never came to be; everything else UNAVAILABLE is a connection that broke.
_NEVER_CONNECTED = ("failed to connect", "DNS resolution failed", "Failed to pick subchannel")

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # After a failed attempt a channel refuses calls until its backoff is over: two minutes are too long for a server
    # that is being restarted.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class GrpcTransport:
    """One channel to the server; may be used from several threads at once."""

    def __init__(self, address: str, timeout_s: float | None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Closes the channel; what still runs on it is cancelled."""
        self._channel.close()

    def ready(self, model: str, timeout_s: float) -> bool:
        """Whether the server says that `model` is ready; False also when nobody listens."""
        try:
            return bool(self._stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=timeout_s).ready)
        except grpc.RpcError:
            return False

    def stream(
        self, model: str, tensors: Sequence[InputTensor], request_id: str, num_sequences: int
    ) -> Generator[Response, None, None]:
        """Sends one request and yields its responses; closing the generator early cancels it at the server."""
        call = self._stub.ModelStreamInfer(iter((_request(model, tensors, request_id),)), timeout=self._timeout_s)
        final = False
        try:
            for message in _messages(call):
                if message.error_message:
                    raise RequestFailed(message.error_message)
                response = message.infer_response
                final = final or response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield Response.from_grpc(response)
                # NOTE: goes on after the final response, so that the server closes the stream: leaving here would
                # look like a cancellation to it.
        except grpc.RpcError as error:
            if not final:  # else the answer is whole, and how the stream ended does not matter
                raise self._explained(error) from error
        finally:
            call.cancel()  # does nothing to a call that has ended
        if not final:
            raise BrokenStream("the server ended the stream without a final response")

    def _explained(self, error: Any) -> ClientError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and self._timeout_s is not None:
            return TimedOut(self._timeout_s)
        if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NEVER_CONNECTED):
            return ServerUnreachable(self._address, details)
        if code is grpc.StatusCode.UNAVAILABLE:
            return BrokenStream(f"the connection to {self._address} broke: {details}")
        return RequestFailed(f"{code.name}: {details}")


def _messages(call: Any) -> Iterator[Any]:
    """The messages of a call, read by a thread of their own when the caller is the main thread.

    Ctrl-C raises KeyboardInterrupt in the main thread, wherever that is. Inside grpc it could leave one of grpc's locks
    locked for ever, and then the call can neither go on nor be cancelled (seen); here it finds a queue.
    """
    if threading.current_thread() is not threading.main_thread():
        yield from call
        return
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def forward() -> None:
        try:
            for message in call:
                arrived.put(message)
        except grpc.RpcError as error:
            arrived.put(error)
        else:
            arrived.put(None)

    threading.Thread(target=forward, name="responses", daemon=True).start()
    while (message := arrived.get()) is not None:
        if isinstance(message, grpc.RpcError):
            raise message
        yield message


def _request(model: str, tensors: Sequence[InputTensor], request_id: str) -> Any:
    """KServe's ModelInferRequest: tensors of shape [1, n] with raw contents."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for tensor in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=(1, len(tensor.values)))
        request.raw_input_contents.append(tensor.raw())
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request
