"""The server behind the gateway, over gRPC: the ensemble asked as a stream, and its two neighbours asked for a text's ids
and for ids' text.

NOTE: this drives the stub that tritonclient generates, on grpc.aio, as client/grpc_transport.py does on threads:
tritonclient's own aio client copies each response through NumPy objects, and does not pass on the status of an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client.errors import BrokenStream
from client.gateway.errors import ApiError, from_rpc
from client.params import InputTensor
from client.response import Response, unpack

MODEL = "ensemble"
_READY_TIMEOUT_S = 2.0
_CALL_TIMEOUT_S = 60.0
# With it an error ends the stream with its status instead of coming as a bare message.
_METADATA = (("triton_grpc_error", "true"),)
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that is being restarted is to be found again at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# What no OpenAI response has; every tensor costs.
_LAST_OUTPUTS = ("finish_reason", "stop_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens")


@dataclass(frozen=True)
class Call:
    """One request to the ensemble: its tensors, and under which parameter's name to complain about which of them."""

    tensors: tuple[InputTensor, ...]
    params: Mapping[str, str]

    def has(self, name: str) -> bool:
        """Whether a tensor is sent."""
        return any(tensor.name == name for tensor in self.tensors)

    def outputs(self) -> list[str]:
        """The outputs that somebody will look at."""
        wanted = ["text_output", "token_ids", *_LAST_OUTPUTS]
        wanted += ["sequence_index"] if self.has("num_return_sequences") else []
        wanted += ["top_log_probs"] if self.has("num_logprobs") else []
        return [*wanted, "prompt_log_probs"] if self.has("prompt_logprobs") else wanted


@dataclass(frozen=True)
class Piece:
    """One response of the ensemble: text and ids since the last, and log-probabilities where they were asked for.

    `places` has an entry for each generated id, `prompt_places` one for each id of the prompt (None for the first), as
    backend/triton_adapter/log_probs.py writes them: id, bytes, log_prob, rank, top.
    """

    response: Response
    places: list[dict[str, Any]]
    prompt_places: list[dict[str, Any] | None] | None


class Ensemble:
    """One channel to Triton; made where the event loop runs."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel; what still runs is cancelled."""
        await self._channel.close()

    async def is_ready(self) -> bool:
        """Whether the ensemble serves."""
        try:
            ready = await self._stub.ModelReady(service_pb2.ModelReadyRequest(name=MODEL), timeout=_READY_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(ready.ready)

    async def generate(self, call: Call, request_id: str) -> AsyncGenerator[Piece, None]:
        """Send a request and give its responses; leaving early takes it back at the engine. ApiError."""
        messages = self._stream(MODEL, call.tensors, call.outputs(), request_id, call.params)
        async with aclosing(messages):
            async for message in messages:
                yield _piece(message)

    async def token_ids(self, tensors: Sequence[InputTensor], params: Mapping[str, str]) -> list[int]:
        """Ids of a prompt in any form, made by the model `preprocessing`. ApiError."""
        request = _request("preprocessing", tensors, ("prompt_token_ids",), "")
        try:
            answer = await self._stub.ModelInfer(request, timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error.code(), error.details() or "", params) from error
        return unpack("prompt_token_ids", "INT32", answer.raw_output_contents[0])

    async def text(self, token_ids: Iterable[int], params: Mapping[str, str]) -> str:
        """Text of ids, made by the model `postprocessing`. ApiError."""
        tensor = InputTensor("token_ids", "INT32", tuple(token_ids))
        messages = self._stream("postprocessing", (tensor,), ("text_output",), "", params)
        return "".join([Response.from_grpc(message).text async for message in messages])

    async def _stream(
        self,
        model: str,
        tensors: Iterable[InputTensor],
        outputs: Iterable[str],
        request_id: str,
        params: Mapping[str, str],
    ) -> AsyncGenerator[Any, None]:
        request = _request(model, tensors, outputs, request_id)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        call = self._stub.ModelStreamInfer(iter((request,)), metadata=_METADATA)
        is_complete = False
        try:
            async for message in call:
                if message.error_message:
                    raise ApiError(500, f"the server failed: {message.error_message}")
                response = message.infer_response
                is_complete = is_complete or response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield response
                # NOTE: goes on after the final response until the server closes the stream: leaving in that moment
                # looks like a cancellation, and server 2.51 then never lets go of the request.
        except grpc.aio.AioRpcError as error:
            if not is_complete:
                raise from_rpc(error.code(), error.details() or "", params) from error
        except BrokenStream as error:
            raise ApiError(500, str(error)) from error
        finally:
            call.cancel()  # does nothing to a call that has ended
        if not is_complete:
            raise ApiError(503, "the server ended the stream without a final response", code="not_ready")


def _request(model: str, tensors: Iterable[InputTensor], outputs: Iterable[str], request_id: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for tensor in tensors:
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=(1, len(tensor.values)))
        request.raw_input_contents.append(tensor.raw())
    for name in outputs:
        request.outputs.add(name=name)
    return request


def _piece(message: Any) -> Piece:
    places = _json_output(message, "top_log_probs")
    return Piece(Response.from_grpc(message), places or [], _json_output(message, "prompt_log_probs"))


def _json_output(message: Any, name: str) -> Any:
    for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
        if output.name == name:
            return orjson.loads(raw[4:])  # one string, behind its length in four bytes
    return None
