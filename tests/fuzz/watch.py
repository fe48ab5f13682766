"""What holds for every case, whatever is parsed: it ends soon, an error is one of the project, and nothing is left open."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from backend.errors import ConfigError, RequestError

MAX_CPU_S = 20.0
"""A case that computes for longer hangs; no right or wrong input needs a hundredth of it."""
MAX_MESSAGE_CHARACTERS = 2000
REFUSALS = (ConfigError, RequestError)


class Hung(BaseException):
    """A case took MAX_CPU_S of CPU time. No Exception, so that nothing on its way takes it for a bad input."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hung when the body has computed for too long (CPU time: what else runs on the machine does not count)."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Hung(f"computed for {MAX_CPU_S:g} s")

    before = signal.signal(signal.SIGPROF, on_signal)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def refusal_of(parse: Callable[[bytes], object], content: bytes) -> Exception | None:
    """Run a case: the project's own error that it ended with, or None.

    Whatever else it raises comes through, with a note of the file in which the case is kept.
    """
    try:
        with bounded():
            parse(content)
    except REFUSALS as error:
        check_message(str(error))
        return error
    except BaseException as error:
        keep_case(error, content)
        raise
    return None


def keep_case(error: BaseException, content: bytes) -> None:
    """Write a case that broke a promise to a file, which a note of the error names."""
    path = Path(tempfile.gettempdir(), f"case-{hashlib.sha256(content).hexdigest()[:16]}")
    path.write_bytes(content)
    error.add_note(f"the case is kept in {path}")


def check_message(message: str) -> None:
    """An error names where and what is wrong, in text that a terminal and a log can take, and not at any length."""
    assert ": " in message or " is " in message, message
    assert len(message) <= MAX_MESSAGE_CHARACTERS, f"{len(message)} characters: {message[:200]}"
    assert message.isprintable(), repr(message)


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """The body leaves no file descriptor and no thread behind."""
    gc.collect()
    files, threads = _open_files(), threading.active_count()
    yield
    gc.collect()
    assert _open_files() <= files, f"{_open_files()} open files, {files} before"
    assert threading.active_count() <= threads, threading.enumerate()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
