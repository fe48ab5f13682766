"""`python -m client "question"`: asks once and prints the answer as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from client.arguments import Arguments, parse
from client.chat import converse
from client.client import Client
from client.meter import Meter
from client.terminal import EXIT_FAILED, complain, exit_code, print_answer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = parse(argv, program="python -m client")
    return exit_code(lambda: converse(arguments) if arguments.chat else _ask(arguments))


def _ask(arguments: Arguments) -> int:
    question = sys.stdin.read() if arguments.question == "-" else arguments.question or ""
    prompt, messages = (question, None) if arguments.raw else (None, _messages(arguments, question))
    num_sequences = arguments.params.num_return_sequences or 1
    with Client(
        arguments.url, protocol=arguments.protocol, model=arguments.model, timeout_s=arguments.timeout_s
    ) as client:
        responses = client.generate(prompt, arguments.params, messages=messages, stream=arguments.stream)
        meter = Meter()
        with closing(responses):
            print_answer(responses, num_sequences, meter)
    if not arguments.quiet:
        print(meter.summary(), file=sys.stderr)
    if any(reason.startswith("error") for reason in meter.finish_reasons.values()):
        complain("the server ended the answer with an error")
        return EXIT_FAILED
    return 0


def _messages(arguments: Arguments, question: str) -> list[dict[str, str]]:
    return [*arguments.opening, {"role": "user", "content": question}]


if __name__ == "__main__":
    sys.exit(main())
