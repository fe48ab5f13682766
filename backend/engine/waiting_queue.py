"""Sequences that wait for a slot and pages, in the order of their ranks, and the bounds on how many may wait."""

from __future__ import annotations

from bisect import insort

from backend.engine.request import GenerationRequest
from backend.engine.sequence import Phase, RequestGroup, Sequence, rank_of
from backend.errors import QueueFull


class WaitingQueue:
    """Waits are counted by request: one of which any sequence waits is waiting, with all tokens of its prompt.

    `max_tokens` 0 means no bound on tokens.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._sequences: list[Sequence] = []
        self.num_requests = 0
        self._num_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._sequences)

    @property
    def first(self) -> Sequence:
        """Whose turn it is."""
        return self._sequences[0]

    def check_room(self, request: GenerationRequest) -> None:
        """Raise QueueFull when a request more would exceed a bound; one that finds nobody waiting may have any length."""
        if self.num_requests >= self._max_requests:
            raise QueueFull(
                f"the queue is full: {self.num_requests} requests wait, max_queued_requests is "
                f"{self._max_requests}; try again later"
            )
        num_tokens = self._num_tokens + len(request.prompt_token_ids)
        if self._max_tokens and self.num_requests and num_tokens > self._max_tokens:
            raise QueueFull(
                f"the queue is full: {self._num_tokens} prompt tokens wait and this request has "
                f"{len(request.prompt_token_ids)}, max_queued_tokens is {self._max_tokens}; try again later"
            )

    def count_in(self, group: RequestGroup) -> None:
        """Count a new request and all its sequences among those that wait; `add` lets it have its turn."""
        self.num_requests += 1
        self._num_tokens += len(group.request.prompt_token_ids)

    def add(self, group: RequestGroup) -> None:
        """Let the first sequence of a request queue; the others follow with `add_siblings`."""
        insort(self._sequences, group.sequences[0], key=rank_of)

    def add_siblings(self, group: RequestGroup) -> None:
        """Let the other samples of a request queue: the pages of their common prompt are there."""
        for sequence in group.sequences[1:]:
            if sequence.phase is Phase.WAITING:
                insort(self._sequences, sequence, key=rank_of)

    def pop_first(self) -> Sequence:
        """Take out whose turn it is."""
        sequence = self._sequences.pop(0)
        self._count_out(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits, whether it queues already or not."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        self._count_out(sequence)

    def check_integrity(self, groups: list[RequestGroup]) -> None:
        """Assert that the counts are those of the requests of `groups` that wait."""
        waiting = [group for group in groups if group.num_waiting]
        assert len(waiting) == self.num_requests, "waiting requests were miscounted"
        num_tokens = sum(len(group.request.prompt_token_ids) for group in waiting)
        assert num_tokens == self._num_tokens, "waiting tokens were miscounted"

    def _count_out(self, sequence: Sequence) -> None:
        sequence.group.num_waiting -= 1
        if sequence.group.num_waiting == 0:
            self.num_requests -= 1
            self._num_tokens -= sequence.num_prompt_tokens
