"""One generation and the request it belongs to. The Scheduler alone changes them."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace
from enum import Enum

from backend.engine.events import Finish, FinishReason
from backend.engine.plan import SlotStart
from backend.engine.request import GenerationRequest, mix_seed, num_pages_for
from backend.engine.stop_matcher import StopString
from backend.engine.text_stream import TextStream


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Sequence:
    """One of a request's `num_return_sequences` generations.

    `num_planned_tokens` counts positions whose step was planned, `num_in_flight` steps that were launched and not committed,
    `num_draws_in_flight` those of them that sample. Pages and slot are held from admission until the sequence is FINISHED
    and nothing of it is in flight.
    """

    def __init__(self, group: RequestGroup, index: int, text: TextStream) -> None:
        self.group = group
        self.request = group.request
        self.index = index
        self.text = text
        self.phase = Phase.WAITING
        self.slot = -1
        self.page_ids: tuple[int, ...] = ()
        self.num_planned_tokens = 0
        self.num_in_flight = 0
        self.num_draws_in_flight = 0
        self.num_outputs = 0
        self.is_echo_due = group.request.echo
        self.first_token_time_ns = 0
        self.last_token_time_ns = 0
        self.first_scheduled_time_ns = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def wants_another_token(self) -> bool:
        """Whether `max_tokens` leaves room for one more draw beyond those in flight."""
        return self.num_outputs + self.num_draws_in_flight < self.request.max_tokens

    @property
    def is_releasable(self) -> bool:
        """Whether slot and pages may go to another sequence."""
        return self.phase is Phase.FINISHED and self.num_in_flight == 0 and self.slot >= 0

    def num_pages_needed(self, page_tokens: int) -> int:
        """Pages for the whole generation; the last id drawn is never run, so it needs no place."""
        return num_pages_for(self.num_prompt_tokens + self.request.max_tokens - 1, page_tokens)

    def slot_start(self) -> SlotStart:
        """What the runner must know when the sequence takes its slot."""
        request = self.request
        sampling = request.sampling
        sampling = replace(sampling, seed=mix_seed(sampling.seed, self.index))
        return SlotStart(sampling, request.prompt_token_ids, request.min_tokens, tuple(sorted(self.group.ending_ids)))

    def finish(self, reason: FinishReason, stop_reason: str = "") -> Finish:
        """End the sequence; the caller sends the Finish exactly once."""
        assert self.phase is not Phase.FINISHED, "a sequence ends once"
        self.phase = Phase.FINISHED
        self.group.num_unfinished -= 1
        return Finish(
            reason,
            stop_reason,
            self.num_prompt_tokens,
            self.num_outputs,
            0,
            self.group.arrival_time_ns,
            self.first_scheduled_time_ns,
            self.first_token_time_ns,
            self.last_token_time_ns,
        )


class RequestGroup:
    """A request that was accepted and the sequences generated for it."""

    def __init__(
        self, request: GenerationRequest, token_bytes: Ids[bytes], eos_id: int, arrival_time_ns: int, deadline_ns: int
    ) -> None:
        self.request = request
        self.arrival_time_ns = arrival_time_ns
        self.deadline_ns = deadline_ns
        self.num_unfinished = request.num_return_sequences
        self.num_waiting = request.num_return_sequences
        self.num_running = 0
        self.has_tokens = False
        end_id = eos_id if request.end_id is None else request.end_id
        self.ending_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else {end_id})
        self.end_id = end_id
        stops = tuple(StopString.compile(text) for text in dict.fromkeys(request.stop_strings))
        self.sequences = tuple(
            Sequence(self, index, TextStream(token_bytes, stops)) for index in range(request.num_return_sequences)
        )
