"""The client itself: one object per server address, one call per request."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from client.http_transport import HttpTransport
from client.params import GenerationParams, InputTensor
from client.response import Response

if TYPE_CHECKING:
    from client.grpc_transport import GrpcTransport

Protocol = Literal["grpc", "http"]
Message = Mapping[str, Any]  # as OpenAI writes it: {"role": "user", "content": "..."}

_DEFAULT_PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}


class Client:
    """Asks one server; safe to use from several threads, each request on a stream of its own.

    `url` is `host:port`, by default localhost with Triton's port of the protocol. `timeout_s` bounds each request as a
    whole; None waits as long as the server does. Raises ValueError for an address or a protocol it cannot use.

        with Client("localhost:8001") as client:
            for response in client.generate("The capital of France is", GenerationParams(max_tokens=8)):
                print(response.text, end="", flush=True)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        protocol: Protocol = "grpc",
        model: str = "ensemble",
        timeout_s: float | None = None,
    ) -> None:
        if protocol not in _DEFAULT_PORTS:
            raise ValueError(f"protocol: grpc or http is wanted, not {protocol!r}")
        self.address = host_and_port(url, protocol)
        self.model = model
        if protocol == "http":
            self._transport: GrpcTransport | HttpTransport = HttpTransport(self.address, timeout_s)
        else:
            # Imported when used, so that HTTP needs neither tritonclient nor grpc.
            from client.grpc_transport import GrpcTransport

            self._transport = GrpcTransport(self.address, timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; requests that still run are cancelled."""
        self._transport.close()

    def ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server says that the model is ready; False also when nobody listens."""
        return self._transport.ready(self.model, timeout_s)

    def generate(
        self,
        prompt: str | None = None,
        params: GenerationParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        stream: bool = True,
        request_id: str = "",
    ) -> Generator[Response, None, None]:
        """Yields the answer to exactly one of `prompt` (raw text), `messages` (chat) and `prompt_token_ids`.

        The request is sent when the first response is asked for. Closing the generator early, or leaving it by an
        exception, cancels the request at the server. Without `stream` each sequence comes as one response.
        Raises at the call ValueError or TypeError for arguments that cannot be sent; while iterating ClientError.
        """
        params = params or GenerationParams()
        tensors = [
            _prompt_tensor(prompt, messages, prompt_token_ids),
            *params.tensors(),
            InputTensor("stream", "BOOL", (stream,)),
        ]
        if tools is not None:
            if messages is None:
                raise ValueError("tools: wanted only together with messages")
            tensors.append(InputTensor("tools", "BYTES", (json.dumps(list(tools)),)))
        return self._transport.stream(self.model, tensors, request_id, params.num_return_sequences or 1)

    def stop(self, request_id: str) -> None:
        """Takes back every request that runs under `request_id`, whoever sent it; each ends as `cancelled`.

        Raises ValueError for an empty id; ClientError when the server cannot be asked.
        """
        if not request_id:
            raise ValueError("request_id: the id of the requests to stop is wanted, not an empty one")
        tensors = [InputTensor("stop", "BOOL", (True,))]
        for _ in self._transport.stream(self.model, tensors, request_id, 1):
            pass


def host_and_port(url: str | None, protocol: Protocol) -> str:
    """`url` as `host:port`; the port defaults to Triton's of the protocol, a scheme of that protocol may be given.

    >>> host_and_port("http://example.org", "http")
    'example.org:8000'
    """
    parts = urlsplit(url if url and "://" in url else f"//{url or 'localhost'}")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url: {url!r}: {error}") from error
    if parts.scheme not in ("", protocol) or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"url: host:port of a server that speaks {protocol} is wanted, not {url!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{_DEFAULT_PORTS[protocol] if port is None else port}"


def _prompt_tensor(
    prompt: str | None, messages: Sequence[Message] | None, prompt_token_ids: Sequence[int] | None
) -> InputTensor:
    given = {"prompt": prompt, "messages": messages, "prompt_token_ids": prompt_token_ids}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"prompt: exactly one of {', '.join(given)} is wanted, not {' and '.join(names) or 'none'}")
    if prompt is not None:
        return InputTensor("text_input", "BYTES", (prompt,))
    if messages is not None:
        return InputTensor("messages", "BYTES", (json.dumps([dict(message) for message in messages]),))
    if not prompt_token_ids:
        raise ValueError("prompt_token_ids: at least one id is wanted, not none")
    return InputTensor("prompt_token_ids", "INT32", tuple(prompt_token_ids))
