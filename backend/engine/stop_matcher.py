"""Finds stop strings in a growing stream of bytes, one byte at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopString:
    """A stop string and its failure table: `failure[n]` is the longest proper border of the first n bytes.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977.

    >>> StopString.compile(b"abab").failure
    (0, 0, 0, 1, 2)
    """

    text: bytes
    failure: tuple[int, ...]

    @classmethod
    def compile(cls, text: bytes) -> StopString:
        """Build the table in time linear in the length of `text`, which is not empty."""
        failure = [0, 0]
        for position in range(1, len(text)):
            border = failure[position]
            while border and text[border] != text[position]:
                border = failure[border]
            failure.append(border + 1 if text[border] == text[position] else 0)
        return cls(text, tuple(failure))


class StopMatcher:
    """State of all stop strings of one sequence: how many bytes of each the stream ends in.

    While `num_bytes_held` is 0, text without any of `first_bytes` need not be pushed: it would change nothing.
    """

    def __init__(self, stops: tuple[StopString, ...]) -> None:
        self.first_bytes = frozenset(stop.text[0] for stop in stops)
        self._stops = stops
        self._matched = [0] * len(stops)

    def push(self, byte: int) -> bytes | None:
        """Add one byte; return the stop string that ends with it (the longest of several), or None."""
        complete: bytes | None = None
        for index, stop in enumerate(self._stops):
            length = self._matched[index]
            if length == len(stop.text):
                length = stop.failure[length]
            while length and stop.text[length] != byte:
                length = stop.failure[length]
            if stop.text[length] == byte:
                length += 1
            self._matched[index] = length
            if length == len(stop.text) and (complete is None or length > len(complete)):
                complete = stop.text
        return complete

    @property
    def num_bytes_held(self) -> int:
        """Bytes at the end of the stream that may still become a stop string."""
        held = 0
        for index, stop in enumerate(self._stops):
            length = self._matched[index]
            held = max(held, stop.failure[length] if length == len(stop.text) else length)
        return held

    def reset(self) -> None:
        """Forget the stream so far."""
        self._matched = [0] * len(self._stops)
