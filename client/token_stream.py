"""One request over gRPC's asyncio client, read as counts of ids: for load generators, which share their cores with the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput  # type: ignore[import-untyped,unused-ignore]

from client.errors import BrokenStream
from client.params import InputTensor

_NUMPY_DTYPES: dict[str, Any] = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}


async def stream_token_counts(client: Any, model: str, tensors: Sequence[InputTensor]) -> AsyncGenerator[int, None]:
    """How many ids each response of a streamed request carries, as it comes; responses without any are passed over.

    `client`: tritonclient.grpc.aio.InferenceServerClient. InferenceServerException or grpc.RpcError when the request fails,
    BrokenStream when the stream ends without a finish_reason. Closing the generator cancels the request.
    """
    inputs = [_infer_input(tensor) for tensor in (*tensors, InputTensor("stream", "BOOL", (True,)))]
    stream = client.stream_infer(_once({"model_name": model, "inputs": inputs}))
    is_finished = False
    try:
        async for result, error in stream:
            if error is not None:
                raise error
            message = result.get_response()
            num_ids = 0
            for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
                if output.name == "token_ids":
                    num_ids = len(raw) // 4
                elif output.name == "finish_reason":
                    is_finished = is_finished or len(raw) > 4  # a string is its length in four bytes, then itself
            if num_ids:
                yield num_ids
    finally:
        stream.cancel()  # does nothing to a stream that has ended
    if not is_finished:
        raise BrokenStream("the stream ended without a finish_reason")


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request


def _infer_input(tensor: InputTensor) -> Any:
    shape = (1, len(tensor.values))
    dtype = _NUMPY_DTYPES.get(tensor.datatype, np.object_)
    return InferInput(tensor.name, shape, tensor.datatype).set_data_from_numpy(np.array([tensor.values], dtype=dtype))
