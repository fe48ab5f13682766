"""Events of one sequence joined into one: what happens wherever tokens come faster than they are taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.engine.events import Finish, TokenEvent
from backend.engine.plan import TokenLogProbs


@dataclass(slots=True)
class JoinedEvent:
    """Ids of one sequence, the text cut that goes with them, and perhaps the end of the sequence (see TokenEvent).

    Its owner decides whether anything may be joined behind `is_closed`.
    """

    handle: int
    sequence_index: int
    token_ids: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    text_skip_bytes: int = 0
    text_take_bytes: int = 0
    is_closed: bool = False
    finish: Finish | None = None
    is_request_end: bool = False
    log_probs: list[TokenLogProbs] = field(default_factory=list)

    def join(self, event: TokenEvent) -> None:
        """Add the next event of the same sequence.

        Two cuts join without a gap. When the second begins inside an id (it skips bytes), that id is the first one's last: it
        was cut there, and is not listed twice.
        """
        self.token_ids += event.token_ids
        if event.text_ids:
            if not self.text_ids:
                self.text_skip_bytes = event.text_skip_bytes
                self.text_ids += event.text_ids
            else:
                self.text_ids += event.text_ids[1:] if event.text_skip_bytes else event.text_ids
            self.text_take_bytes += event.text_take_bytes
        self.log_probs += event.log_probs
        self.is_closed = self.is_closed or event.is_closed
        self.finish = event.finish
        self.is_request_end = event.is_request_end

    def event(self) -> TokenEvent:
        """As one event."""
        return TokenEvent(
            self.handle,
            self.sequence_index,
            tuple(self.token_ids),
            tuple(self.text_ids),
            self.text_skip_bytes,
            self.text_take_bytes,
            self.is_closed,
            self.finish,
            self.is_request_end,
            tuple(self.log_probs),
        )
