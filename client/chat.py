"""`python -m client.chat`: a conversation on the terminal that keeps its history."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from client.arguments import Arguments, parse
from client.client import Client
from client.errors import ClientError, ServerUnreachable
from client.meter import Meter
from client.terminal import complain, exit_code, print_answer

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = parse(argv, program="python -m client.chat", chat=True)
    return exit_code(lambda: converse(arguments))


def converse(arguments: Arguments) -> int:
    """Asks turn by turn until the end of input; a turn that failed or was stopped is as if it had not been."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() line editing; only a terminal wants it)
    messages = arguments.opening
    with Client(
        arguments.url, protocol=arguments.protocol, model=arguments.model, timeout_s=arguments.timeout_s
    ) as client:
        print(f"{client.model} at {client.address}; {_HELP}", file=sys.stderr)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            if line == "/exit":
                return 0
            if line == "/reset":
                messages = arguments.opening
            elif line.startswith("/"):
                complain(f"{line.split()[0]}: no such command; {_HELP}")
            elif line:
                question = {"role": "user", "content": line}
                answer = _turn(client, [*messages, question], arguments)
                if answer is not None:
                    messages = [*messages, question, {"role": "assistant", "content": answer}]


def _turn(client: Client, messages: list[dict[str, str]], arguments: Arguments) -> str | None:
    """Prints the next answer; None when there is none to go on from."""
    responses = client.generate(params=arguments.params, messages=messages, stream=arguments.stream)
    meter = Meter()
    try:
        with closing(responses):
            answer = print_answer(responses, 1, meter)
    except KeyboardInterrupt:
        complain("stopped; the question and its answer are forgotten")
        return None
    except ServerUnreachable:
        raise
    except ClientError as error:
        complain(str(error))
        return None
    if not arguments.quiet:
        print(meter.summary(), file=sys.stderr)
    return answer


if __name__ == "__main__":
    sys.exit(main())
