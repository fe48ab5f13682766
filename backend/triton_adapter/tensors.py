"""Triton's requests and responses as plain Python values: the only place that knows how tensors look.

All tensors are [1, n] (max_batch_size is 1), as TensorRT-LLM's clients send them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from backend.errors import NemoError, RequestError, one_line, shown


class Inputs:
    """The inputs of one request, by name. Absent inputs read as None or as empty."""

    def __init__(self, request: Any) -> None:
        self._tensors: dict[str, Any] = {tensor.name(): tensor for tensor in request.inputs()}

    def has(self, name: str) -> bool:
        """Whether the client sent this input."""
        return name in self._tensors

    def number(self, name: str) -> Any:
        """One int, float or bool, or None; RequestError when it is not exactly one value."""
        values = self.numbers(name)
        if values is None:
            return None
        if len(values) != 1:
            raise RequestError(name, f"must hold exactly 1 value, got {len(values)}")
        return values[0]

    def numbers(self, name: str) -> list[Any] | None:
        """All values as Python numbers, or None."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        values: list[Any] = tensor.as_numpy().reshape(-1).tolist()
        return values

    def text(self, name: str) -> str | None:
        """One UTF-8 string, or None."""
        texts = self.texts(name)
        if texts is None:
            return None
        if len(texts) != 1:
            raise RequestError(name, f"must hold exactly 1 string, got {len(texts)}")
        return texts[0]

    def texts(self, name: str) -> list[str] | None:
        """All strings, or None; RequestError when one is not UTF-8."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        texts = []
        for index, value in enumerate(tensor.as_numpy().reshape(-1).tolist()):
            try:
                texts.append(value.decode("utf-8") if isinstance(value, bytes) else str(value))
            except UnicodeDecodeError as error:
                raise RequestError(name, f"string {index} is not UTF-8: {error.reason} at byte {error.start}") from None
        return texts


def refuse_parameters(request: Any, known_inputs: Iterable[str]) -> None:
    """Refuse request parameters: every JSON key of /generate that is no input arrives as one and would be ignored.

    The same for an id or a parameter that is no text: the server takes any bytes for them.
    """
    try:
        request.request_id()
    except UnicodeDecodeError as error:
        raise RequestError("id", f"is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        parameters = json.loads(request.parameters() or "{}")
    except ValueError as error:  # UnicodeDecodeError is one
        raise RequestError("parameters", f"cannot be read: {one_line(str(error))}") from None
    for name, value in parameters.items():
        if name == "id" or name.startswith("triton_"):
            continue  # Triton's own: the request id of /generate, and triton_enable_empty_final_response
        listed = ", ".join(sorted(known_inputs))
        raise RequestError(
            one_line(name), f"is not an input of this model (value {shown(value)}); inputs are: {listed}"
        )


def request_id(request: Any) -> str:
    """The client's id, for logs; empty when it is no text, which `refuse_parameters` refuses."""
    try:
        given: str = request.request_id()
    except UnicodeDecodeError:
        return ""
    return given


def input_names(model_config: dict[str, Any]) -> tuple[str, ...]:
    """The declared inputs of a parsed model configuration."""
    return tuple(tensor["name"] for tensor in model_config["input"])


def int_tensor(name: str, values: Iterable[int], dtype: type = np.int32) -> Any:
    """Integers as a tensor [1, n]."""
    return pb_utils.Tensor(name, np.array([list(values)], dtype=dtype))


def array_tensor(name: str, array: Any) -> Any:
    """A NumPy array that has its final shape."""
    return pb_utils.Tensor(name, array)


def text_tensor(name: str, text: str) -> Any:
    """One string as a tensor [1, 1]."""
    return pb_utils.Tensor(name, np.array([[text.encode("utf-8")]], dtype=np.object_))


def response(tensors: list[Any]) -> Any:
    """A response with these tensors."""
    return pb_utils.InferenceResponse(output_tensors=tensors)


def error_response(error: Exception) -> Any:
    """A response that carries an error with its Triton status (INTERNAL for what was not raised on purpose)."""
    status = error.triton_status if isinstance(error, NemoError) else "INTERNAL"
    message = str(error) if isinstance(error, NemoError) else f"internal error: {type(error).__name__}: {error}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, status)))


FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
"""Flag of the last response of a request."""
