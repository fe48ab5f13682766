"""A streamed answer on a terminal: text to standard output, counts and errors to standard error, exit codes."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable

from client.errors import ClientError
from client.meter import Meter
from client.response import Response

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def print_answer(responses: Iterable[Response], num_sequences: int, meter: Meter) -> str:
    """Prints responses as they come and returns the text of the first sequence.

    Several sequences would be unreadable interleaved: each is printed when it is complete, under its number.
    """
    texts: dict[int, list[str]] = defaultdict(list)
    at_line_start = True
    try:
        for response in responses:
            meter.add(response)
            texts[response.sequence_index].append(response.text)
            if num_sequences == 1:
                print(response.text, end="", flush=True)
                at_line_start = response.text.endswith("\n") if response.text else at_line_start
            elif response.finish_reason:
                text = "".join(texts[response.sequence_index])
                print(f"[{response.sequence_index + 1}/{num_sequences}] {text}", flush=True)
    finally:
        if not at_line_start:
            print(flush=True)  # also when the answer breaks off, so that what follows starts a line
    return "".join(texts[0])


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"client: {message}", file=sys.stderr, flush=True)


def exit_code(command: Callable[[], int]) -> int:
    """Runs `command`; its exit code, 1 with one line for an error, 130 for Ctrl-C (the request is cancelled then)."""
    try:
        return command()
    except ClientError as error:
        complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain("cancelled")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
