"""One generation and the request it belongs to. The Scheduler alone changes them."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Any, Protocol

from backend.engine.events import Finish, FinishReason, TokenEvent
from backend.engine.kv_memory import Holder
from backend.engine.plan import PlanRow, SlotStart, TokenLogProbs
from backend.engine.request import GenerationRequest, mix_seed, num_pages_for
from backend.engine.stop_matcher import StopString
from backend.engine.text_stream import TextStream, TokenTexts

_PRIORITY_STEP_NS = 10_000_000_000
"""One step of priority is worth ten seconds of waiting. So ranks never change, and nobody waits for ever."""
Mask = Any
"""Which ids a draw may give, as the runner wants it (NumPy, INT32 words); nothing here looks into it."""


class Matcher(Protocol):
    """How far one sequence is in its grammar (GuideMatcher in guide.py)."""

    def accept(self, token_id: int) -> None:
        """Go on by an id that is allowed."""

    def mask(self) -> Mask:
        """Allowed ids; a single one where it is forced."""

    def forced_ids(self) -> tuple[int, ...]:
        """Ids that come next for certain, looked up once after each free choice; none when there is a choice."""


class Guide(Protocol):
    """A compiled grammar."""

    def start(self) -> Matcher:
        """A matcher at the beginning."""


class Phase(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class Sequence:
    """One of a request's `num_return_sequences` generations.

    `num_planned_tokens` counts positions whose step was planned, `num_in_flight` steps that were launched and not committed,
    `decode_end`, while it decodes, the position where `max_tokens` ends its planning (0 in other phases). Pages and slot are held
    from admission until the sequence is FINISHED and nothing of it is in flight.
    """

    # NOTE: slots, and what a step needs close at hand: hundreds of these are visited in each, and what that costs is memory.
    __slots__ = (
        *("decode_end", "first_scheduled_time_ns", "first_token_time_ns", "group", "guide", "handle", "has_started"),
        *("index", "is_echo_due", "is_text_free", "kv", "last_token_time_ns", "num_cached_tokens", "num_in_flight"),
        *("num_planned_tokens", "output_ids", "phase", "prompt_log_probs", "rank", "request", "slot", "table", "text"),
    )

    def __init__(self, group: RequestGroup, index: int, text: TextStream, holder: Holder) -> None:
        self.group = group
        self.request = group.request
        self.handle = group.request.handle
        self.index = index
        self.rank = (group.rank_ns, group.order, index)
        self.text = text
        self.kv = holder
        self.table = holder.table
        self.guide: Matcher | None = None
        self.phase = Phase.WAITING
        self.slot = -1
        self.has_started = False
        self.num_planned_tokens = 0
        self.num_cached_tokens = 0
        self.num_in_flight = 0
        self.decode_end = 0
        self.is_text_free = False
        self.output_ids: list[int] = []
        self.prompt_log_probs: list[TokenLogProbs] = []
        self.is_echo_due = group.request.echo
        self.first_token_time_ns = 0
        self.last_token_time_ns = 0
        self.first_scheduled_time_ns = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_outputs(self) -> int:
        """Tokens generated."""
        return len(self.output_ids)

    @property
    def can_decode(self) -> bool:
        """Whether the next step may draw for it: `max_tokens` leaves room, and the stream is not far ahead of its client."""
        return self.num_planned_tokens < self.decode_end and self.group.num_unsent < self.group.most_unsent

    @property
    def num_wanted_tokens(self) -> int:
        """Tokens it would run if a step had no bound."""
        if self.phase is Phase.PREFILL:
            return self.num_prompt_tokens - self.num_planned_tokens
        return self.can_decode

    @property
    def is_plain(self) -> bool:
        """Whether each id that is drawn freely and has text of its own is told at once, as it is and alone, until the last."""
        request = self.request
        return (
            self.phase is Phase.DECODE
            and self.is_text_free
            and request.num_logprobs is None
            and request.num_return_sequences == 1
            and not self.group.ending_ids_with_text
        )

    @property
    def num_draws_in_flight(self) -> int:
        """Output ids that steps in flight will give, forced ones included."""
        return self.request.max_tokens - (self.decode_end - self.num_planned_tokens) - len(self.output_ids)

    @property
    def is_releasable(self) -> bool:
        """Whether slot and pages may go to another sequence."""
        return self.phase is Phase.FINISHED and self.num_in_flight == 0 and self.slot >= 0

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """Those at positions `start` to `end - 1` of prompt and output."""
        prompt = self.request.prompt_token_ids
        return (*prompt[start:end], *self.output_ids[max(0, start - len(prompt)) : max(0, end - len(prompt))])

    def slot_start(self) -> SlotStart:
        """What the runner must know when the sequence takes its slot."""
        request = self.request
        sampling = replace(request.sampling, seed=mix_seed(request.sampling.seed, self.index))
        ending_ids = tuple(sorted(self.group.ending_ids))
        return SlotStart(sampling, request.prompt_token_ids, request.min_tokens, ending_ids, request.num_logprobs)

    def decode_row(self) -> PlanRow:
        """Its row in the next step, where the id drawn last runs."""
        start = self.num_planned_tokens
        self.num_planned_tokens = start + 1
        self.num_in_flight += 1
        return PlanRow(self.slot, start, 1, (), self.table.page_ids, True)

    def guided_row(self, known_ids: tuple[int, ...]) -> PlanRow:
        """As `decode_row`, where a grammar masks the draw and may force ids before it (`known_ids`)."""
        start, num_tokens = self.num_planned_tokens, len(known_ids) or 1
        self.num_planned_tokens = start + num_tokens
        self.num_in_flight += 1
        page_ids, num_forced = self.table.page_ids, num_tokens - 1
        return PlanRow(self.slot, start, num_tokens, known_ids, page_ids, True, num_forced=num_forced, is_guided=True)

    def prefill_row(self, end: int) -> PlanRow:
        """Its row in the next step, where its prompt goes on up to `end`."""
        request, start = self.request, self.num_planned_tokens
        is_last = end == self.num_prompt_tokens
        is_sampled = is_last and request.max_tokens > 0
        slot_start = None if self.has_started else self.slot_start()
        self.has_started = True
        self.num_planned_tokens = end
        self.num_in_flight += 1
        if is_last:
            self.phase = Phase.DECODE
            self.decode_end = end + request.max_tokens - 1
        return PlanRow(
            self.slot,
            start,
            end - start,
            request.prompt_token_ids[start:end],
            self.table.page_ids,
            is_sampled,
            slot_start,
            request.num_prompt_logprobs if self.index == 0 else None,
            is_guided=self.guide is not None,
        )

    def append(self, token_id: int, log_prob: TokenLogProbs | None, now_ns: int) -> TokenEvent:
        """Take over the next id; the event ends the sequence when the id, a stop string or the length does."""
        self.output_ids.append(token_id)
        self.last_token_time_ns = now_ns
        group = self.group
        group.num_unsent += 1
        num_bytes = group.lengths_alone[token_id] if self.is_text_free else self.text.num_bytes_alone(token_id)
        if (
            num_bytes
            and self.num_planned_tokens < self.decode_end
            and self.first_token_time_ns
            and token_id not in group.ending_ids_with_text
        ):
            # What nearly every id is, and hundreds of them in every step: in the middle, with text that goes out as it is.
            ids = (token_id,)
            log_probs = () if log_prob is None else (log_prob,)
            return TokenEvent(self.handle, self.index, ids, ids, 0, num_bytes, False, None, False, log_probs)
        event = self._append(token_id, log_prob, now_ns)
        self.is_text_free = self.text.is_free
        return event

    def _append(self, token_id: int, log_prob: TokenLogProbs | None, now_ns: int) -> TokenEvent:
        """`append` where anything may happen: a beginning, an end, text that is held back."""
        request = self.request
        num_outputs = len(self.output_ids)
        echoed: tuple[int, ...] = ()
        if num_outputs == 1:
            echoed = self._take_echo()
            self.group.has_tokens = True
            self.first_token_time_ns = now_ns
        may_stop = num_outputs >= request.min_tokens
        stop = self.text.append(token_id, may_stop=may_stop)
        finish = None
        if stop is not None:
            finish = self._finish(FinishReason.STOP, stop.decode("utf-8", "replace"))
        elif may_stop and token_id in self.group.ending_ids:
            is_end = token_id == self.group.end_id and token_id not in request.stop_token_ids
            self.text.finish()
            finish = self._finish(FinishReason.STOP, "" if is_end else str(token_id))
        elif num_outputs == request.max_tokens:
            self.text.finish()
            finish = self._finish(FinishReason.LENGTH)
        return self._event((*echoed, token_id), finish, log_prob)

    def known_ids(self, most: int) -> tuple[int, ...]:
        """What the grammar forces: the id that is being drawn and those behind it, when there is at least one behind it.

        Not when log-probabilities are asked for, since an id that is not drawn has none.
        """
        if self.guide is None or self.num_draws_in_flight != 1 or self.request.num_logprobs is not None:
            return ()
        # One more draw comes behind the forced ids, and all must stay within max_tokens.
        room = self.request.max_tokens - self.num_outputs - 1
        ids = self.guide.forced_ids()[: max(0, min(room, most))]
        return ids if len(ids) > 1 else ()

    def finish_score(self, now_ns: int) -> TokenEvent:
        """End a sequence that only wanted the log-probabilities of its prompt."""
        self.last_token_time_ns = now_ns
        self.group.has_tokens = True
        echoed = self._take_echo()
        self.text.finish()
        return self._event(echoed, self._finish(FinishReason.LENGTH))

    def end(self, reason: FinishReason) -> TokenEvent:
        """End the sequence for a reason that is not its own."""
        self.text.finish()
        return self._event((), self._finish(reason))

    def _take_echo(self) -> tuple[int, ...]:
        if not self.is_echo_due:
            return ()
        self.is_echo_due = False
        self.text.append_echo(self.request.prompt_token_ids)
        return self.request.prompt_token_ids

    def _event(
        self, token_ids: tuple[int, ...], finish: Finish | None, log_prob: TokenLogProbs | None = None
    ) -> TokenEvent:
        is_closed = bool(token_ids) and self.text.is_control(token_ids[-1])
        is_request_end = finish is not None and self.group.num_unfinished == 0
        cut = self.text.take()
        log_probs = () if log_prob is None else (log_prob,)
        return TokenEvent(
            self.request.handle, self.index, token_ids, *cut, is_closed, finish, is_request_end, log_probs
        )

    def _finish(self, reason: FinishReason, stop_reason: str = "") -> Finish:
        assert self.phase is not Phase.FINISHED, "a sequence ends once"
        self.phase = Phase.FINISHED
        self.decode_end = 0
        self.group.num_unfinished -= 1
        return Finish(
            reason,
            stop_reason,
            self.num_prompt_tokens,
            self.num_outputs,
            self.num_cached_tokens,
            self.group.arrival_time_ns,
            self.first_scheduled_time_ns,
            self.first_token_time_ns,
            self.last_token_time_ns,
            tuple(self.prompt_log_probs),
        )


def rank_of(sequence: Sequence) -> tuple[int, int, int]:
    """The rank, for sorting."""
    return sequence.rank


class RequestGroup:
    """A request that was accepted and the sequences generated for it.

    All of them share the pages of the prompt. So only the first waits from the start; the others queue behind it once its
    prompt has been run. Where the prefix cache is off, or must not be read, a salt of their own keeps the sharing among them.
    `is_ready`: nothing but its turn is missing; not so while its grammar is compiled. `num_unsent` counts ids that were
    generated and not yet sent to the client; from `most_unsent` on, the request pauses.
    """

    __slots__ = (  # NOTE: as in Sequence
        *("arrival_time_ns", "deadline_ns", "end_id", "ending_ids", "ending_ids_with_text", "has_tokens", "is_ready"),
        *("lengths_alone", "most_unsent", "num_running", "num_unfinished", "num_unsent", "num_waiting", "order"),
        *("rank_ns", "request", "sequences"),
    )

    def __init__(
        self,
        request: GenerationRequest,
        texts: TokenTexts,
        eos_id: int,
        page_tokens: int,
        arrival_time_ns: int,
        deadline_ns: int,
        order: int,
        *,
        has_prefix_cache: bool,
        most_unsent: int,
    ) -> None:
        self.request = request
        self.is_ready = request.guide is None
        self.arrival_time_ns = arrival_time_ns
        self.deadline_ns = deadline_ns
        self.order = order
        self.rank_ns = arrival_time_ns + request.priority * _PRIORITY_STEP_NS
        self.num_unfinished = request.num_return_sequences
        self.num_waiting = request.num_return_sequences
        self.num_running = 0
        self.has_tokens = False
        self.num_unsent = 0
        self.most_unsent = most_unsent
        self.end_id = eos_id if request.end_id is None else request.end_id
        self.ending_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else {self.end_id})
        self.lengths_alone = texts.lengths_alone
        self.ending_ids_with_text = frozenset(each for each in self.ending_ids if texts.token_bytes[each])
        may_read = has_prefix_cache and request.num_prompt_logprobs is None
        salt = f"tenant:{request.cache_salt}" if may_read else f"request:{request.handle}"
        stops = tuple(StopString.compile(text) for text in dict.fromkeys(request.stop_strings))
        n = request.num_return_sequences
        # The last id drawn is never run, so it needs no place; a prompt that is only scored needs all of its own.
        num_pages = num_pages_for(len(request.prompt_token_ids) + max(request.max_tokens, 1) - 1, page_tokens)
        self.sequences: tuple[Sequence, ...] = tuple(
            Sequence(
                self,
                index,
                TextStream(texts, stops),
                Holder(salt, num_pages, may_read_cache=may_read or index > 0, may_write_cache=may_read or n > 1),
            )
            for index in range(request.num_return_sequences)
        )

    def let_go(self) -> None:
        """Once nothing of it runs any more: a group and its sequences refer to each other, and would wait for the collector."""
        if self.num_unfinished == 0 and self.num_running == 0:
            self.sequences = ()

    def start_guide(self, guide: Guide) -> None:
        """Let every sequence follow the grammar; RequestError when it cannot be started so often."""
        for sequence in self.sequences:
            sequence.guide = guide.start()
        self.is_ready = True
