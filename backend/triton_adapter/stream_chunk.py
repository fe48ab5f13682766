"""The one tensor between `mistral_nemo` and `postprocessing`.

Every tensor of a response costs (three go through at half the rate of one), so what a response needs travels packed into a
single INT32 tensor `stream_chunk`:

    [0] version     [1] handle, low half     [2] handle, high half     [3] flags
    [4] sequence_index     [5] num_return_sequences     [6] number of token ids     [7] number of text ids
    [8] text_skip_bytes     [9] text_take_bytes     [10] number     [11 ...] token ids, then text ids
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VERSION = 2
_HEADER_LENGTH = 11
_FLAG_BEAT = 1
_COUNTS = ("sequence_index", "num_return_sequences", "text_skip_bytes", "text_take_bytes", "number")

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """New ids of one sequence and the cut of the text that goes with them (backend.engine.text_stream.TextCut).

    `is_beat`: carries nothing; it only lets postprocessing look whether the client is still there. `number` counts chunks (see
    chunk_window.py).
    """

    handle: int
    sequence_index: int = 0
    num_return_sequences: int = 1
    token_ids: tuple[int, ...] = ()
    text_ids: tuple[int, ...] = ()
    text_skip_bytes: int = 0
    text_take_bytes: int = 0
    is_beat: bool = False
    number: int = 0

    def pack(self) -> Int32Array:
        """As an INT32 array of shape [1, n]."""
        header = (
            VERSION,
            _signed(self.handle & 0xFFFFFFFF),
            _signed(self.handle >> 32),
            _FLAG_BEAT if self.is_beat else 0,
            self.sequence_index,
            self.num_return_sequences,
            len(self.token_ids),
            len(self.text_ids),
            self.text_skip_bytes,
            self.text_take_bytes,
            self.number,
        )
        return np.array([(*header, *self.token_ids, *self.text_ids)], dtype=np.int32)

    @classmethod
    def unpack(cls, packed: Int32Array) -> StreamChunk:
        """From what `pack` made; ValueError when it is something else (a client called postprocessing by hand)."""
        values = packed.reshape(-1).tolist()
        if len(values) < _HEADER_LENGTH or values[0] != VERSION:
            raise ValueError(f"stream_chunk: {len(values)} values do not begin with version {VERSION} and a header")
        _, low, high, flags, index, num_sequences, num_tokens, num_text, skip, take, number = values[:_HEADER_LENGTH]
        if min(num_tokens, num_text) < 0 or len(values) != _HEADER_LENGTH + num_tokens + num_text:
            raise ValueError(
                f"stream_chunk: {len(values)} values do not hold {num_tokens} token and {num_text} text ids"
            )
        if flags not in (0, _FLAG_BEAT):
            raise ValueError(f"stream_chunk: flags must be 0 or {_FLAG_BEAT}, got {flags}")
        for name, value in zip(_COUNTS, (index, num_sequences, skip, take, number), strict=True):
            if value < 0:
                raise ValueError(f"stream_chunk: {name} must be at least 0, got {value}")
        ids = values[_HEADER_LENGTH:]
        handle = (high & 0xFFFFFFFF) << 32 | (low & 0xFFFFFFFF)
        return cls(
            handle,
            index,
            num_sequences,
            tuple(ids[:num_tokens]),
            tuple(ids[num_tokens:]),
            skip,
            take,
            bool(flags & _FLAG_BEAT),
            number,
        )


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
