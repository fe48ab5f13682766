"""The command line of `python -m client` and `python -m client.chat`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from client.client import Protocol, host_and_port
from client.params import GenerationParams, InputTensor

_PARAM_FLAGS: dict[str, tuple[str, type, str]] = {
    "max_tokens": ("--max-tokens", int, "tokens to generate at most"),
    "min_tokens": ("--min-tokens", int, "tokens before an end or a stop may come"),
    "temperature": ("--temperature", float, "0 is greedy, which is also the default"),
    "top_k": ("--top-k", int, "sample among the k likeliest tokens; 0: off"),
    "top_p": ("--top-p", float, "sample among the likeliest tokens that make up this probability"),
    "min_p": ("--min-p", float, "sample among tokens at least this likely, relative to the likeliest"),
    "repetition_penalty": ("--repetition-penalty", float, "over prompt and output; 1: off"),
    "presence_penalty": ("--presence-penalty", float, "over the output; 0: off"),
    "frequency_penalty": ("--frequency-penalty", float, "over the output, per occurrence; 0: off"),
    "seed": ("--seed", int, "same seed, same request: same answer"),
    "num_return_sequences": ("-n", int, "number of answers, each printed when it is complete"),
    "deadline_ms": ("--deadline-ms", int, "the server gives up after this many milliseconds"),
    "priority": ("--priority", int, "a lower number runs first"),
}


@dataclass(frozen=True)
class Arguments:
    """What the command line asked for, checked."""

    question: str | None
    chat: bool
    raw: bool
    system: str | None
    stream: bool
    quiet: bool
    url: str | None
    protocol: Protocol
    model: str
    timeout_s: float | None
    params: GenerationParams

    @property
    def opening(self) -> list[dict[str, str]]:
        """The messages every conversation starts with."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def parse(argv: Sequence[str] | None, *, program: str, chat: bool = False) -> Arguments:
    """Reads the command line; ends the process with code 2 and one line for what cannot be meant.

    `chat` is what `--chat` would say, for the program that is a chat anyway.
    """
    parser = _parser(program, chat)
    namespace = parser.parse_args(argv)
    question: str | None = None if chat else namespace.question
    is_chat: bool = chat or namespace.chat
    raw: bool = not chat and namespace.raw
    if is_chat and question is not None:
        parser.error("question: not wanted with --chat")
    if not is_chat and question is None:
        parser.error("question: wanted, unless --chat is given")
    if raw and (is_chat or namespace.system is not None):
        parser.error("--raw: sends the text as it is, without --chat and --system")
    if is_chat and (namespace.num_return_sequences or 1) != 1:
        parser.error("-n: a chat goes on from one answer")
    guide_type, guide = namespace.guide or (None, None)
    try:
        host_and_port(namespace.url, namespace.protocol)
        params = GenerationParams(
            stop_words=tuple(namespace.stop),
            ignore_eos=namespace.ignore_eos or None,
            guided_decoding_guide_type=guide_type,
            guided_decoding_guide=guide or None,
            **{name: getattr(namespace, name) for name in _PARAM_FLAGS},
        )
        params.tensors()
        InputTensor("question", "BYTES", (question or "", namespace.system or ""))
    except ValueError as error:
        parser.error(str(error))
    return Arguments(
        question=question,
        chat=is_chat,
        raw=raw,
        system=namespace.system,
        stream=namespace.stream,
        quiet=namespace.quiet,
        url=namespace.url,
        protocol=namespace.protocol,
        model=namespace.model,
        timeout_s=namespace.timeout,
        params=params,
    )


def _parser(program: str, chat: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Ask the server and print its answer as it is made.", allow_abbrev=False
    )
    if not chat:
        parser.add_argument("question", nargs="?", help="what to ask; - reads it from standard input")
        parser.add_argument("--chat", action="store_true", help="a conversation on the terminal")
        parser.add_argument("--raw", action="store_true", help="continue the text; no chat template")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="wait for the whole answer")
    parser.add_argument("--quiet", action="store_true", help="no counts and speeds at the end")
    server = parser.add_argument_group("server")
    server.add_argument("--url", metavar="HOST:PORT", help="default: localhost with Triton's port, 8001 or 8000")
    server.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    server.add_argument("--model", default="ensemble")
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="give up on an answer after this long")
    sampling = parser.add_argument_group("sampling (the server's defaults hold for what is not given)")
    for name, (flag, kind, text) in _PARAM_FLAGS.items():
        sampling.add_argument(flag, dest=name, type=kind, help=text, metavar="N" if kind is int else "X")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end of the answer")
    sampling.add_argument(
        "--guide",
        nargs=2,
        metavar=("KIND", "TEXT"),
        help="what the answer must follow: json '', json_schema, regex, ebnf_grammar, choice and its text",
    )
    return parser
