"""What text may have been sent at a moment, worked out the slow and obvious way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

UNFINISHED = {
    chr(code).encode()[:length]
    for code in range(0x80, 0x110000, 0x40)
    if not 0xD800 <= code < 0xE000
    for length in range(1, len(chr(code).encode()))
}
"""Every beginning of every character: one code point in 64 is enough, they differ in their last byte only."""


class Output(NamedTuple):
    """A generated id, and whether a stop string that it completes counts (`min_tokens`)."""

    token_id: int
    may_stop: bool


class Allowed(NamedTuple):
    """Text that may have been sent, and the stop string that ended it."""

    text: str
    stop: bytes | None


def allowed_text(
    token_bytes: Sequence[bytes],
    outputs: Iterable[Output],
    stops: Sequence[bytes] = (),
    echo: Iterable[int] = (),
    *,
    is_finished: bool = False,
) -> Allowed:
    """Everything before the first stop string that is completed, less what may still change when more ids come.

    A control id (no bytes) closes the text before it: it is decoded by itself, and no stop string reaches across.
    """
    closed, segment, generated = "", bytearray(), bytearray()
    for token_id in echo:
        segment += token_bytes[token_id]
        if not token_bytes[token_id]:
            closed, segment = closed + segment.decode("utf-8", "replace"), bytearray()
    for output in outputs:
        if not token_bytes[output.token_id]:
            closed += segment.decode("utf-8", "replace")
            segment, generated = bytearray(), bytearray()
        for byte in token_bytes[output.token_id]:
            segment.append(byte)
            generated.append(byte)
            completed = [stop for stop in stops if generated.endswith(stop)]
            if completed and output.may_stop:
                stop = max(completed, key=len)
                return Allowed(closed + segment[: -len(stop)].decode("utf-8", "replace"), stop)
    if is_finished:
        return Allowed(closed + segment.decode("utf-8", "replace"), None)
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    num_held = max((len(text) for text in beginnings if generated.endswith(text)), default=0)
    text = bytes(segment[: len(segment) - num_held])
    num_unfinished = max(
        (length for length in (1, 2, 3) if text[-length:] in UNFINISHED and length <= len(text)), default=0
    )
    return Allowed(closed + text[: len(text) - num_unfinished].decode("utf-8", "replace"), None)


def decode_cut(token_bytes: Sequence[bytes], text_ids: Sequence[int], skip_bytes: int, take_bytes: int) -> str:
    """The text of a cut; bytes on two sides of a control id are decoded apart."""
    num_bytes = sum(len(token_bytes[token_id]) for token_id in text_ids)
    assert 0 <= skip_bytes <= skip_bytes + take_bytes <= num_bytes, "the ids hold what is cut out of them"
    position, parts = 0, [bytearray()]
    for token_id in text_ids:
        if not token_bytes[token_id]:
            parts.append(bytearray())
        for byte in token_bytes[token_id]:
            if skip_bytes <= position < skip_bytes + take_bytes:
                parts[-1].append(byte)
            position += 1
    return "".join(part.decode("utf-8", "replace") for part in parts)
