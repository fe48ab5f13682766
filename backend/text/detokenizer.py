"""Token ids to text, as the engine tells: a pure function without any state of a stream."""

from __future__ import annotations

from collections.abc import Sequence


def cut_text(token_bytes: Sequence[bytes], text_ids: Sequence[int], skip_bytes: int, take_bytes: int) -> str:
    """Join the bytes of `text_ids`, leave out `skip_bytes` at the front, and decode the next `take_bytes`.

    `token_bytes` has the bytes of every token id (b"" for special ones). Bytes that are not UTF-8 become U+FFFD: where
    to cut so that this happens only where the whole output has it too is the engine's business. Bytes on the two sides
    of a special id are no character together. ValueError if an id is
    not in the vocabulary, if a number of bytes is negative, or if the ids do not hold that many bytes.

    >>> cut_text([b"", b"Hello", b" wor", b"ld"], [1, 2, 3, 0], skip_bytes=1, take_bytes=9)
    'ello worl'
    """
    if skip_bytes < 0 or take_bytes < 0:
        raise ValueError(f"skip_bytes and take_bytes must be >= 0 but are {skip_bytes} and {take_bytes}")
    for token_id in text_ids:
        if not 0 <= token_id < len(token_bytes):
            raise ValueError(f"text_ids must be 0 to {len(token_bytes) - 1} but one is {token_id}")
    end, num_bytes = skip_bytes + take_bytes, sum(len(token_bytes[token_id]) for token_id in text_ids)
    if end > num_bytes:
        raise ValueError(f"text_ids hold {num_bytes} bytes, fewer than skip_bytes + take_bytes = {end}")
    parts, position = [bytearray()], 0
    for token_id in text_ids:
        text = token_bytes[token_id]
        if not text:
            parts.append(bytearray())
        parts[-1] += text[max(0, skip_bytes - position) : max(0, end - position)]
        position += len(text)
    return "".join(part.decode("utf-8", errors="replace") for part in parts)
