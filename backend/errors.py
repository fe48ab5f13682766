"""Every error this project raises on purpose, and the Triton status each one becomes.

    NemoError
     +-- ConfigError         a setting, a checkpoint or the machine is not usable: refuse to start
     +-- RequestError        the caller's mistake                      INVALID_ARG   HTTP 400
     +-- QueueFull           no room to queue the request              UNAVAILABLE   HTTP 503
     +-- DeadlineExceeded    nothing was generated before the deadline UNAVAILABLE   HTTP 503
     +-- Cancelled           the client took the request back          CANCELLED     HTTP 499
     +-- EngineFailure       the engine died, is stuck or is draining  UNAVAILABLE   HTTP 503

Messages name the field, its bound and the value found, so that nobody has to read code to mend a request.
"""

from __future__ import annotations

from typing import ClassVar

_SHOWN_CHARACTERS = 120
_LIBRARY_CHARACTERS = 400


class NemoError(Exception):
    """Base of all errors raised on purpose; `triton_status` names a member of Triton's error codes."""

    triton_status: ClassVar[str] = "INTERNAL"


class ConfigError(NemoError):
    """A setting, a checkpoint or the machine cannot be used; the server refuses to start."""


class RequestError(NemoError):
    """The caller's mistake in one field of a request; it fails alone."""

    triton_status = "INVALID_ARG"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class QueueFull(NemoError):
    """The request was refused at once because the queue is at its limit."""

    triton_status = "UNAVAILABLE"


class DeadlineExceeded(NemoError):
    """`deadline_ms` passed before the first token (afterwards it is a finish reason, not an error)."""

    triton_status = "UNAVAILABLE"


class Cancelled(NemoError):
    """The request was taken back by its client before anything was generated."""

    triton_status = "CANCELLED"


class EngineFailure(NemoError):
    """The engine died, is stuck, is restarting or is shutting down."""

    triton_status = "UNAVAILABLE"


def shown(value: object) -> str:
    """`repr(value)`, cut so that a hostile input cannot fill the log."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def one_line(text: str) -> str:
    """What a library said, which may repeat a hostile input: cut, and with escapes for what is not printable.

    >>> one_line("bad\\x00 \\ud800\\n é")
    'bad\\\\x00 \\\\ud800\\\\n é'
    """
    cut = text if len(text) <= _LIBRARY_CHARACTERS else f"{text[:_LIBRARY_CHARACTERS]}... ({len(text)} characters)"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
