"""What the engine says about its requests: new ids, endings, failures, and how busy it is."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from backend.engine.plan import TokenLogProbs
from backend.engine.text_stream import TextCut


class FinishReason(StrEnum):
    """Why a sequence ended, as clients see it."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class Finish(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The end of one sequence. `stop_reason` is the stop string, the stop id in decimal, or empty.

    Times are nanoseconds of the monotonic clock, 0 when the moment never came. `prompt_log_probs` has an entry for each prompt
    token but the first, when they were asked for.
    """

    reason: FinishReason
    stop_reason: str
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    arrival_time_ns: int
    first_scheduled_time_ns: int
    first_token_time_ns: int
    last_token_time_ns: int
    prompt_log_probs: tuple[TokenLogProbs, ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New ids of one sequence and the text that may be sent because of them.

    `text_ids`, `text_skip_bytes`, `text_take_bytes` are a TextCut. `is_closed`: nothing may be joined behind these ids in the
    same response, because they end in a control id. `finish` comes with the last event of a sequence, exactly once;
    `is_request_end` with the last of all its request's sequences. `log_probs` belong to the last of `token_ids` (those
    before them are an echo).
    """

    handle: int
    sequence_index: int
    token_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    text_skip_bytes: int
    text_take_bytes: int
    is_closed: bool
    finish: Finish | None
    is_request_end: bool = False
    log_probs: tuple[TokenLogProbs, ...] = ()

    @property
    def text(self) -> TextCut:
        """The text part."""
        return TextCut(self.text_ids, self.text_skip_bytes, self.text_take_bytes)


class PlainTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """TokenEvents as columns: what most sequences have to say in most steps, one id whose text of so many bytes goes out with it.

    Each is of the only sequence of its request, in the middle of it, without log-probabilities.
    """

    handles: list[int]
    token_ids: list[int]
    num_bytes: list[int]

    def events(self) -> list[TokenEvent]:
        """One by one."""
        return [
            TokenEvent(handle, 0, (token_id,), (token_id,), 0, num_bytes, False, None)
            for handle, token_id, num_bytes in zip(self.handles, self.token_ids, self.num_bytes, strict=True)
        ]


class FailureKind(StrEnum):
    """Which error of backend.errors a failed request is answered with."""

    INVALID = "invalid"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ENGINE = "engine"


class RequestFailed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that ends without (further) tokens: the only answer to it, for all its sequences."""

    handle: int
    kind: FailureKind
    message: str


SingleEvent = TokenEvent | RequestFailed
Event = SingleEvent | PlainTokens


def one_by_one(events: Iterable[Event]) -> list[SingleEvent]:
    """The same events without columns."""
    singles: list[SingleEvent] = []
    for event in events:
        singles += event.events() if isinstance(event, PlainTokens) else (event,)
    return singles


STEP_TIME_BOUNDS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Upper bounds of the bins in which the times of steps are counted."""


class EngineStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How busy the engine is after a step. Pages, requests and sequences are gauges; steps, tokens and preemptions only grow.

    `num_preempted_sequences` counts how often a sequence lost pages to another, `num_swapped_pages` pages moved to the host.
    `step_time_s`: seconds the loop spent in turns that launched or committed a step; `step_time_counts`: how many such turns took
    at most each of STEP_TIME_BOUNDS_S, and how many longer than the last (none in two of them).
    """

    num_requests_running: int
    num_requests_waiting: int
    num_pages: int
    num_pages_held: int
    num_pages_cached: int
    num_steps: int
    num_planned_tokens: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_preempted_sequences: int
    num_swapped_pages: int
    step_time_s: float = 0.0
    step_time_counts: tuple[int, ...] = ()
