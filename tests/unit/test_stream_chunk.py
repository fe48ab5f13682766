"""The packed tensor between engine and postprocessing: what goes in comes out, and junk is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.triton_adapter.stream_chunk import StreamChunk

words = st.integers(0, 2**31 - 1)
ids = st.lists(words, max_size=5).map(tuple)
chunks = st.builds(
    StreamChunk,
    handle=st.integers(0, 2**64 - 1),
    sequence_index=words,
    num_return_sequences=words,
    token_ids=ids,
    text_ids=ids,
    text_skip_bytes=words,
    text_take_bytes=words,
    is_beat=st.booleans(),
    number=words,
)


@given(chunk=chunks)
@example(chunk=StreamChunk(2**64 - 1))
@example(chunk=StreamChunk(2**63 | 2**31))
def test_round_trip(chunk: StreamChunk) -> None:
    packed = chunk.pack()
    assert packed.dtype == np.int32
    assert packed.shape == (1, 11 + len(chunk.token_ids) + len(chunk.text_ids))
    assert StreamChunk.unpack(packed) == chunk


@given(chunk=chunks, change=st.integers(-3, 3).filter(bool))
def test_a_chunk_of_another_length_is_refused(chunk: StreamChunk, change: int) -> None:
    values = chunk.pack().reshape(-1).tolist()
    changed = values[:change] if change < 0 else values + [1] * change
    with pytest.raises(ValueError, match=f"stream_chunk: {len(changed)} values do not"):
        StreamChunk.unpack(np.array([changed], dtype=np.int32))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 0, "begin with version 2"),
        (0, 1, "begin with version 2"),
        (3, 2, "flags must be 0 or 1, got 2"),
        (4, -1, "sequence_index must be at least 0, got -1"),
        (6, -1, "do not hold -1 token and 2 text ids"),
        (6, 2, "do not hold 2 token and 2 text ids"),
        (7, -1, "do not hold 1 token and -1 text ids"),
        (8, -1, "text_skip_bytes must be at least 0, got -1"),
        (9, -1, "text_take_bytes must be at least 0, got -1"),
        (10, -1, "number must be at least 0, got -1"),
    ],
)
def test_junk_is_refused(position: int, value: int, message: str) -> None:
    packed = StreamChunk(5, token_ids=(1,), text_ids=(1, 2), text_take_bytes=3).pack()
    packed[0, position] = value
    with pytest.raises(ValueError, match=message):
        StreamChunk.unpack(packed)


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="0 values do not begin with version 2 and a header"):
        StreamChunk.unpack(np.zeros((1, 0), dtype=np.int32))
