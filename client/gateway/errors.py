"""Errors in OpenAI's shape, and which status each error of the ensemble becomes.

400 the caller's mistake (with `param`)      401 no or wrong key           404 unknown model or path
413 body too large                           429 the engine's queue is full (with Retry-After)
499 the client is gone or took it back       503 loading, draining, restarting, deadline before the first token
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import grpc
import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "request_cancelled",
}
_RETRY_AFTER_S = {429: "1", 503: "2"}

# Triton and its models put their own names in front of what a model says.
_WRAPPING = re.compile(
    r"^(?:in ensemble '[^']*', )?(?:Failed to process the request\(s\) for model '[^']*', message: )?"
)
_FIELD = re.compile(r"^([a-z][a-z0-9_]*): (.+)$", re.DOTALL)

# How the tensor that an error names is called in an OpenAI request.
_PARAM_OF_TENSOR = {
    "text_input": "prompt",
    "prompt_token_ids": "prompt",
    "stop_words": "stop",
    "num_return_sequences": "n",
    "num_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "logit_bias_ids": "logit_bias",
    "logit_bias_values": "logit_bias",
    "guided_decoding_guide": "response_format",
    "guided_decoding_guide_type": "response_format",
}


class ApiError(HTTPException):
    """An error the client sees: HTTP status, message, the parameter it is about, and OpenAI's code if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        headers = {"Retry-After": _RETRY_AFTER_S[status]} if status in _RETRY_AFTER_S else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole HTTP response."""
        return Response(orjson.dumps(self.body()), self.status_code, self.headers, media_type="application/json")


def bad_request(param: str, problem: str) -> ApiError:
    """The caller's mistake in one parameter."""
    return ApiError(400, f"{param}: {problem}", param)


def from_rpc(status: grpc.StatusCode, details: str, params: Mapping[str, str]) -> ApiError:
    """What an error of the ensemble is to an OpenAI client; `params` are names that go before the usual ones."""
    message = _WRAPPING.sub("", details).strip() or status.name
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        return _invalid(message, params)
    if status is grpc.StatusCode.CANCELLED:
        return ApiError(499, message, code="cancelled")
    if status is grpc.StatusCode.UNAVAILABLE and message.startswith("the queue is full"):
        return ApiError(429, message, code="queue_full")
    if status is grpc.StatusCode.UNAVAILABLE and message.startswith("deadline_ms"):
        return ApiError(503, message, code="deadline_exceeded")
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
        # An unloaded ensemble is NOT_FOUND to Triton; our own model names were checked before.
        return ApiError(503, f"the model is not ready: {message}", code="not_ready")
    return ApiError(500, f"the server failed: {message}")


def _invalid(message: str, params: Mapping[str, str]) -> ApiError:
    found = _FIELD.match(message)
    if found is None:
        return ApiError(400, message)
    tensor, problem = found.groups()
    param = params.get(tensor) or _PARAM_OF_TENSOR.get(tensor, tensor)
    code = "context_length_exceeded" if "max_model_len" in problem else None
    return ApiError(400, f"{param}: {problem}", param, code)
