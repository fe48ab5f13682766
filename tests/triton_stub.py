"""As much of Triton's `triton_python_backend_utils` as the adapter needs to decode, answer and count requests in this process."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from backend.errors import RequestError
from tests.triton.calls import declared_inputs

_CODES = (
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    """A message with one of Triton's codes."""

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    """Tensors, or an error."""

    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor for tensor in output_tensors}
        self.error = error


class Metric:
    """Counts as Triton's does, and refuses what it refuses."""

    def __init__(self, kind: str) -> None:
        self.kind, self.value = kind, 0.0

    def increment(self, amount: float) -> None:
        assert self.kind == "COUNTER"
        assert amount > 0, "a counter only grows"
        self.value += amount

    def set(self, value: float) -> None:
        assert self.kind == "GAUGE"
        self.value = value


class MetricFamily:
    """Remembers every metric by name and labels, for as long as the stub is there."""

    COUNTER, GAUGE, HISTOGRAM = "COUNTER", "GAUGE", "HISTOGRAM"
    made: ClassVar[defaultdict[str, dict[str, Metric]]] = defaultdict(dict)

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name, self._kind = name, kind

    def Metric(self, labels: dict[str, str], **_: Any) -> Metric:
        metric = Metric(self._kind)
        self.made[self._name][",".join(f"{key}={value}" for key, value in labels.items())] = metric
        return metric


class Request:
    """A request that keeps what it was answered."""

    def __init__(self, model: str, tensors: list[Tensor], parameters: Mapping[str, Any]) -> None:
        self.model = model
        self.answers: list[InferenceResponse] = []
        self._tensors, self._parameters = tensors, json.dumps(parameters)

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return "fuzz"

    def requested_output_names(self) -> list[str]:
        return ["text_output", "token_ids"]

    def is_cancelled(self) -> bool:
        return False

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if response is not None:
            self.answers.append(response)


@contextmanager
def triton_stub() -> Iterator[None]:
    """Let the adapter be imported."""
    fake = ModuleType("triton_python_backend_utils")
    vars(fake).update(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse, MetricFamily=MetricFamily
    )
    MetricFamily.made.clear()
    vars(fake)["TRITONSERVER_RESPONSE_COMPLETE_FINAL"] = 1
    for code in _CODES:
        setattr(TritonError, code, code)
    with patch.dict(sys.modules, {"triton_python_backend_utils": fake}):
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.startswith("backend.triton_adapter")]:
                del sys.modules[name]


def request_of(model: str, values: object) -> Request:
    """What the server makes of the JSON of `/generate`: declared keys as tensors [1, n], the others as parameters.

    RequestError for what the server itself refuses. Integers beyond 32 bits are cut, as it does.
    """
    if not isinstance(values, dict):
        raise RequestError("json", "must be an object")
    declared = declared_inputs(model)
    tensors = [Tensor(name, _array(name, declared[name], value)) for name, value in values.items() if name in declared]
    parameters = {name: value for name, value in values.items() if name not in declared}
    return Request(
        model, tensors, {name: value for name, value in parameters.items() if isinstance(value, str | int | bool)}
    )


def _array(name: str, datatype: str, value: object) -> Any:
    values = value if isinstance(value, list) else [value]
    try:
        if datatype == "BYTES":
            made = np.empty((1, len(values)), dtype=np.object_)
            made[0, :] = [_encoded(each) for each in values]
            return made
        if datatype.startswith(("INT", "UINT")):
            bits = int(datatype.removeprefix("UINT").removeprefix("INT"))
            if not all(type(each) is int for each in values):
                raise TypeError("not all are whole numbers")
            unsigned = np.array([[each % 2**bits for each in values]], dtype=f"uint{bits}")
            return unsigned.astype(triton_to_np_dtype(datatype))
        with np.errstate(over="ignore"):
            return np.array([values], dtype=np.float64).astype(triton_to_np_dtype(datatype))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(name, f"cannot be of type {datatype}: {error}".replace("\n", " ")[:200]) from None


def _encoded(value: object) -> bytes:
    if not isinstance(value, str):
        raise TypeError("not all are strings")
    return value.encode("utf-8", "surrogatepass")
