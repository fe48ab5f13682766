"""A small typed client of the server: `Client(url).generate(...)` yields an answer as it is made.

Needs `tritonclient[grpc]` for gRPC and nothing but the standard library for HTTP; never the server's own code.
"""

from __future__ import annotations

from client.client import Client, Message, Protocol
from client.errors import BrokenStream, ClientError, RequestFailed, ServerUnreachable, TimedOut
from client.params import GenerationParams
from client.response import Response

__all__ = [
    "BrokenStream",
    "Client",
    "ClientError",
    "GenerationParams",
    "Message",
    "Protocol",
    "RequestFailed",
    "Response",
    "ServerUnreachable",
    "TimedOut",
]
