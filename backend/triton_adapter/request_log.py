"""One line in the log for each sequence that ended and each request that failed, with the request's id and never its text."""

from __future__ import annotations

import logging

from backend.engine.events import Finish
from backend.errors import RequestError

log = logging.getLogger("nemo.request")


def log_finish(request_id: str, finish: Finish) -> None:
    """Log how a sequence ended."""
    first_token_ms = _ms(finish.arrival_time_ns, finish.first_token_time_ns)
    duration_ms = _ms(finish.arrival_time_ns, finish.last_token_time_ns)
    log.info(
        "request %r ended: %s, %d tokens for %d of prompt",
        request_id,
        finish.reason.value,
        finish.num_output_tokens,
        finish.num_input_tokens,
        extra={
            "fields": {
                "request_id": request_id,
                "finish_reason": finish.reason.value,
                "num_input_tokens": finish.num_input_tokens,
                "num_output_tokens": finish.num_output_tokens,
                "num_cached_tokens": finish.num_cached_tokens,
                "first_token_ms": first_token_ms,
                "duration_ms": duration_ms,
            }
        },
    )


def log_failure(request_id: str, error: Exception) -> None:
    """Log that a request was answered with an error: its kind, and the field if one was wrong.

    NOTE: not its message, which may quote what the client sent.
    """
    fields = {"request_id": request_id, "error": type(error).__name__}
    if isinstance(error, RequestError):
        fields["field"] = error.field
    log.info("request %r failed: %s", request_id, type(error).__name__, extra={"fields": fields})


def _ms(start_ns: int, end_ns: int) -> float | None:
    return round((end_ns - start_ns) / 1e6, 1) if end_ns else None
