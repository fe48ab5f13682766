"""Which text of one sequence may be sent: the engine's whole knowledge of text is the bytes of every id.

Tekken is byte-level BPE, so text is the concatenation of the ids' bytes. Two things are held back: the bytes of an
unfinished UTF-8 character, and bytes that may be the beginning of a stop string. What may be sent is described by ids and a
cut (`TextCut`), from which postprocessing makes the string without any state of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backend.engine.stop_matcher import StopMatcher, StopString


class TextCut(NamedTuple):
    """Text as bytes of `text_ids`: join them, drop `skip_bytes`, take `take_bytes`, decode UTF-8."""

    text_ids: tuple[int, ...] = ()
    skip_bytes: int = 0
    take_bytes: int = 0


def num_unfinished_bytes(text: bytes | bytearray) -> int:
    """Bytes at the end of `text` that begin a UTF-8 character which more bytes could complete (0 to 3).

    >>> num_unfinished_bytes("€".encode()[:2]), num_unfinished_bytes("€".encode()), num_unfinished_bytes(b"\\xff")
    (2, 0, 0)
    """
    for length in range(1, min(3, len(text)) + 1):
        lead = text[-length]
        if lead & 0xC0 == 0x80:
            continue
        if not 0xC2 <= lead <= 0xF4:
            return 0
        size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if length >= size:
            return 0
        return length if _may_begin_character(bytes(text[-length:])) else 0
    return 0


def _may_begin_character(prefix: bytes) -> bool:
    """Whether the second byte is allowed after the lead (no overlong forms, surrogates or code points past U+10FFFF)."""
    if len(prefix) == 1:
        return True
    low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
        prefix[0], (0x80, 0xBF)
    )
    return low <= prefix[1] <= high


class TokenTexts:
    """The bytes of every id, and `lengths_alone`: how many, of an id behind which the text may be cut if it may be cut before it.

    0 stands for an id without text, or whose text ends in an unfinished character or is longer than 255 bytes.

    >>> list(TokenTexts((b"", b"ab", "€".encode(), "€".encode()[:2])).lengths_alone)
    [0, 2, 3, 0]
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes
        self.lengths_alone = bytes(
            [0 if num_unfinished_bytes(text) or len(text) > 255 else len(text) for text in token_bytes]
        )


class TextStream:
    """Bytes of one sequence that were generated and not yet released, and the stop strings seen in them.

    The bytes that may be released always end where decoding may be cut: behind a whole character, behind bytes that are no
    character whatever follows, or where a control id or the end of the sequence closes the text.
    """

    def __init__(self, texts: TokenTexts, stops: tuple[StopString, ...] = ()) -> None:
        self._token_bytes = texts.token_bytes
        self._lengths_alone = texts.lengths_alone
        self._matcher = StopMatcher(stops) if stops else None
        self._held_ids: list[int] = []
        self._held = bytearray()
        self._num_skipped_bytes = 0
        self._num_free_bytes = 0
        self._num_stop_bytes = 0

    def is_control(self, token_id: int) -> bool:
        """Whether an id has no text."""
        return not self._token_bytes[token_id]

    def num_bytes_alone(self, token_id: int) -> int:
        """Bytes of an id that may be sent at once and without `append`, because they touch nothing held back; else 0."""
        if self._held or (
            self._matcher is not None and not self._matcher.first_bytes.isdisjoint(self._token_bytes[token_id])
        ):
            return 0
        return self._lengths_alone[token_id]

    @property
    def is_free(self) -> bool:
        """Whether nothing is held back and no stop strings are looked for: `num_bytes_alone` is what `lengths_alone` says."""
        return self._matcher is None and not self._held

    def append_echo(self, token_ids: Sequence[int]) -> None:
        """Add the prompt's ids: their text is sent, stop strings are not looked for in it."""
        for token_id in token_ids:
            if self._token_bytes[token_id]:
                self._held_ids.append(token_id)
                self._held += self._token_bytes[token_id]
            else:
                self._close(token_id)
        self._free_up_to(len(self._held))

    def append(self, token_id: int, *, may_stop: bool = True) -> bytes | None:
        """Add one generated id; return the stop string it completes, if any.

        After a match the text ends before the match. A match is passed over when `may_stop` is False (`min_tokens`).
        A control id has no bytes: it closes the text before it, so nothing is held back across it.
        """
        text = self._token_bytes[token_id]
        if not text:
            self._close(token_id)
            return None
        num_before = len(self._held)
        self._held_ids.append(token_id)
        self._held += text
        if self._matcher is None or (not self._num_stop_bytes and self._matcher.first_bytes.isdisjoint(text)):
            self._free_up_to(len(self._held))
            return None
        for offset, byte in enumerate(text):
            stop = self._matcher.push(byte)
            if stop is not None and may_stop:
                self._num_free_bytes = num_before + offset + 1 - len(stop)
                return stop
        self._num_stop_bytes = self._matcher.num_bytes_held
        self._free_up_to(len(self._held) - self._num_stop_bytes)
        return None

    def finish(self) -> None:
        """Nothing follows: everything held back may be sent."""
        self._num_free_bytes = len(self._held)

    def take(self) -> TextCut:
        """Release what may be sent now."""
        num_taken = self._num_free_bytes
        if not num_taken:
            return _NO_TEXT
        self._num_free_bytes = 0
        if num_taken == len(self._held):
            cut = TextCut(tuple(self._held_ids), self._num_skipped_bytes, num_taken)
            self._held_ids.clear()
            self._held.clear()
            self._num_skipped_bytes = 0
            return cut
        del self._held[:num_taken]
        end = self._num_skipped_bytes + num_taken
        num_ids = 0
        while end and end >= (num_bytes := len(self._token_bytes[self._held_ids[num_ids]])):
            end -= num_bytes
            num_ids += 1
        text_ids = tuple(self._held_ids[: num_ids + bool(end)])
        del self._held_ids[:num_ids]
        cut = TextCut(text_ids, self._num_skipped_bytes, num_taken)
        self._num_skipped_bytes = end
        return cut

    def _free_up_to(self, end: int) -> None:
        """Allow the release of the bytes before `end`, but for a character that is not finished there."""
        start = self._num_free_bytes
        if end > start:
            self._num_free_bytes = (
                end if self._held[end - 1] < 0x80 else end - num_unfinished_bytes(self._held[start:end])
            )

    def _close(self, control_id: int) -> None:
        """End the text before a control id.

        NOTE: the id is kept as a part of the text when an unfinished character stands before it: it alone shows, where cuts
        are joined, that bytes behind it do not complete that character.
        """
        if num_unfinished_bytes(self._held[self._num_free_bytes :]):
            self._held_ids.append(control_id)
        self.finish()
        if self._matcher is not None:
            self._matcher.reset()
            self._num_stop_bytes = 0


_NO_TEXT = TextCut()
