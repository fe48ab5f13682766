"""What the engine's process and its owner say to each other: one MessagePack frame a message, typed on both sides.

Nothing is pickled, so neither side can make the other run code.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import msgspec

from backend.engine.events import EngineStats, Event, PlainTokens, RequestFailed, TokenEvent
from backend.engine.request import GenerationRequest
from backend.settings import Settings


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to the process: what to serve."""

    settings: Settings


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue a request that has been validated."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Take back the request with this handle."""

    handle: int


class AbortRequestId(msgspec.Struct, frozen=True, tag=True):
    """Take back every request that its client named `request_id`."""

    request_id: str


class Sent(msgspec.Struct, frozen=True, tag=True):
    """So many ids of these requests, by handle, have been sent to their clients."""

    counts: dict[int, int]


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress while loading: what, and how many of how many bytes."""

    what: str
    bytes_done: int
    bytes_total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves: the bounds requests are validated against, and a description for log and metadata.

    A step that takes longer than `step_timeout_s` is stuck.
    """

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_pages: int
    step_timeout_s: float
    description: dict[str, str]


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Sent every second while the engine serves: how long the loop has been in its current turn, 0 when it is idle."""

    turn_age_s: float


class Step(msgspec.Struct, frozen=True, tag=True):
    """Everything one turn of the loop has to say, for all sequences at once."""

    singles: tuple[TokenEvent, ...]
    failed: tuple[RequestFailed, ...]
    stats: EngineStats
    plain: PlainTokens | None = None

    @classmethod
    def of(cls, events: list[Event], stats: EngineStats) -> Step:
        """The events of one turn, which commits one step at most."""
        plain = [event for event in events if isinstance(event, PlainTokens)]
        assert len(plain) <= 1, f"{len(plain)} steps were committed in one turn"
        singles = tuple([event for event in events if isinstance(event, TokenEvent)])
        failed = tuple([event for event in events if isinstance(event, RequestFailed)])
        return cls(singles, failed, stats, plain[0] if plain else None)

    @property
    def tokens(self) -> list[TokenEvent]:
        """All events with tokens: `singles`, and those of `plain` one by one."""
        return [*self.singles, *(() if self.plain is None else self.plain.events())]


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; the process ends after this. `is_config` tells a ConfigError from a failure."""

    message: str
    is_config: bool


SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the others of its process waiting, on both sides: Python's 5 ms is more than a step takes."""

ToEngine = Start | Submit | Abort | AbortRequestId | Sent
FromEngine = Loading | Ready | Alive | Step | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def send(connection: Connection, message: ToEngine | FromEngine) -> None:
    """Write one message; OSError when the other side is gone."""
    connection.send_bytes(_encoder.encode(message))


def receive_in_engine(connection: Connection) -> ToEngine:
    """Read one message of the owner; EOFError when it is gone."""
    message: ToEngine = _to_engine.decode(connection.recv_bytes())
    return message


def receive_from_engine(connection: Connection) -> FromEngine:
    """Read one message of the engine; EOFError when it is gone."""
    message: FromEngine = _from_engine.decode(connection.recv_bytes())
    return message
