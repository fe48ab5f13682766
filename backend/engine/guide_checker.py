"""A process that tries a guide first, because one in ten lines can bring its compiler down.

llguidance bounds the work of most grammars, not of all: a long chain of `$ref` overflows its stack, which ends the
process, and some short schemas take minutes or gigabytes. So a guide is compiled here first, with less time, memory and
stack than the engine has; one that this process survives is safe in the engine. Run as a module, this file is that
process: it answers lines of JSON on its standard input until that ends.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
from typing import BinaryIO

from llguidance import LLTokenizer

from backend.engine.guide_grammar import GuideKind, new_matcher, problem_of, shorten, to_grammar

MAX_CPU_S = 2.0
MAX_MEMORY_BYTES = 256 * 2**20
_STACK_BYTES = 4 * 2**20  # half of what threads usually have
_STOP_TIMEOUT_S = 5.0


class GuideRefused(Exception):
    """The guide cannot be used; the message says why."""


class GuideChecker:
    """Owns the process; starts it at the first guide, and again after a guide has ended it. One caller at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, kind: GuideKind, text: str) -> str:
        """The grammar of a guide that compiles within MAX_CPU_S and MAX_MEMORY_BYTES; GuideRefused otherwise."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([kind, text]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self._process = None
            status = _wait(process)
            if status == -signal.SIGPROF:
                raise GuideRefused(f"too complex: it takes more than {MAX_CPU_S:g} s to compile")
            raise GuideRefused(f"too complex: compiling it needs too much stack or memory (status {status})")
        grammar, problem = json.loads(line)
        if problem:
            raise GuideRefused(problem)
        assert isinstance(grammar, str)
        return grammar

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _wait(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "backend.engine.guide_checker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic would write the client's grammar into the log
        )
        return self._process


def _wait(process: subprocess.Popen[bytes]) -> int:
    with process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            process.stdin.close()
        try:
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _answer(tokenizer: LLTokenizer, kind: GuideKind, text: str) -> tuple[str, str]:
    """(grammar, problem): one of them is empty."""
    try:
        grammar = to_grammar(kind, text)
    except RecursionError:
        return "", "is too deeply nested"
    except ValueError as error:
        return "", shorten(str(error))
    matcher = new_matcher(tokenizer, grammar)
    if not matcher.is_error():
        # A forced text that does not end shows at the first step through it.
        if forced := matcher.compute_ff_tokens():
            matcher.consume_token(forced[0])
        matcher.compute_bitmask()
    problem = problem_of(matcher)
    return ("", problem) if problem else (grammar, "")


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    # Single bytes are vocabulary enough to see whether a grammar compiles.
    tokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
        encoder={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
        pattern=r"\S+|\s+",
        eos_token=256,
        n_vocab=257,
    )
    for line in requests:
        kind, text = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # its signal ends the process
        answer = _answer(tokenizer, GuideKind(kind), text)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer), name="guide-checker")
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
