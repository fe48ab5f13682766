"""Every error the client raises on purpose; each message is one line that a person can act on.

ClientError
 +-- ServerUnreachable   nobody listens at the address
 +-- RequestFailed       the server answered with an error; the message is the server's own
 +-- BrokenStream        the connection ended, or carried nonsense, before the answer was complete
 +-- TimedOut            the request took longer than the client's `timeout_s`
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of all errors the client raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ServerUnreachable(ClientError):
    """Nobody listens at `url`; nothing was sent."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(
            f"no server answers at {url}: start one with `make serve`, or name its address with --url ({cause})"
        )
        self.url = url


class RequestFailed(ClientError):
    """The server refused the request or failed while it was running."""


class BrokenStream(ClientError):
    """The connection ended, or carried something unreadable, before the answer was complete."""


class TimedOut(ClientError):
    """The request took longer than the client allows; it was cancelled."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"timeout_s: no complete answer within {timeout_s:g} s; the request was cancelled")
        self.timeout_s = timeout_s
