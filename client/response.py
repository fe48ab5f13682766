"""One response of the server, read from a gRPC message or from a server-sent event."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from client.errors import BrokenStream

_STRUCT_CODES = {"INT32": "i", "INT64": "q", "FP32": "f", "BOOL": "?"}
_STRUCT_SIZES = {code: struct.calcsize(f"<{code}") for code in _STRUCT_CODES.values()}
_READ = frozenset(
    (
        "text_output",
        "token_ids",
        "sequence_index",
        "finish_reason",
        "stop_reason",
        "num_input_tokens",
        "num_output_tokens",
        "num_cached_tokens",
        "output_log_probs",
        "cum_log_probs",
        "top_log_probs",
        "prompt_log_probs",
    )
)
Place = Mapping[str, Any]


@dataclass(frozen=True)
class Response:
    """What came since the last response of the same sequence.

    `text` and `token_ids` may differ in what they cover: text can be held back until it is sure not to be part of a
    stop string. `finish_reason` is empty until the last response of its sequence (`stop`, `length`, `cancelled`,
    `deadline`, `error`); `stop_reason` is then the stop string or id, if any. The counts come with the last response
    and are None before: tokens of the prompt, of the output, and of the prompt found in the server's prefix cache.

    Log-probabilities come when they were asked for. `output_log_probs` has one for each generated id, `cum_log_probs` is the
    sum of all so far. `top_log_probs` has for each of these ids, and `prompt_log_probs` (with the last response) for each id
    of the prompt, a place: {"log_prob": ..., "rank": ..., "top": [{"id": ..., "log_prob": ..., "rank": ..., "bytes":
    [...]}]}; None for the first id of the prompt.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    sequence_index: int = 0
    finish_reason: str = ""
    stop_reason: str = ""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    output_log_probs: tuple[float, ...] = ()
    cum_log_probs: float | None = None
    top_log_probs: tuple[Place, ...] = ()
    prompt_log_probs: tuple[Place | None, ...] = ()

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, list[Any]]) -> Response:
        """From output tensors by name, each a flat list; names that are not ours are left alone.

        Raises BrokenStream for values of the wrong type.
        """
        try:
            return cls(
                text="".join(outputs.get("text_output", ())),
                token_ids=tuple(int(token_id) for token_id in outputs.get("token_ids", ())),
                sequence_index=_count(outputs, "sequence_index") or 0,
                finish_reason="".join(outputs.get("finish_reason", ())),
                stop_reason="".join(outputs.get("stop_reason", ())),
                num_input_tokens=_count(outputs, "num_input_tokens"),
                num_output_tokens=_count(outputs, "num_output_tokens"),
                num_cached_tokens=_count(outputs, "num_cached_tokens"),
                output_log_probs=tuple(float(value) for value in outputs.get("output_log_probs", ())),
                cum_log_probs=float(outputs["cum_log_probs"][0]) if outputs.get("cum_log_probs") else None,
                top_log_probs=_places(outputs, "top_log_probs"),
                prompt_log_probs=_places(outputs, "prompt_log_probs"),
            )
        except (TypeError, ValueError) as error:
            raise BrokenStream(f"the server sent an output of the wrong type: {error}") from error

    @classmethod
    def from_json(cls, event: Mapping[str, Any]) -> Response:
        """From the JSON of one event of `generate_stream`, where a tensor of one element is a scalar."""
        return cls.from_outputs(
            {name: value if isinstance(value, list) else [value] for name, value in event.items() if name in _READ}
        )

    @classmethod
    def from_grpc(cls, message: Any) -> Response:
        """From KServe's ModelInferResponse with raw contents."""
        if len(message.raw_output_contents) != len(message.outputs):
            raise BrokenStream(
                f"the server sent {len(message.outputs)} outputs with {len(message.raw_output_contents)} raw contents"
            )
        return cls.from_outputs(
            {
                output.name: unpack(output.name, output.datatype, raw)
                for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
                if output.name in _READ
            }
        )


def unpack(name: str, datatype: str, raw: bytes) -> list[Any]:
    """The elements of one raw tensor, strings decoded as UTF-8.

    Raises BrokenStream for content that is no such tensor.
    """
    if datatype != "BYTES":
        code = _STRUCT_CODES.get(datatype)
        if code is None or len(raw) % _STRUCT_SIZES[code]:
            raise BrokenStream(f"{name}: {len(raw)} bytes are no tensor of datatype {datatype}")
        return list(struct.unpack(f"<{len(raw) // _STRUCT_SIZES[code]}{code}", raw))
    strings: list[str] = []
    offset = 0
    while offset < len(raw):
        end = offset + 4 + int.from_bytes(raw[offset : offset + 4], "little")
        if end > len(raw) or offset + 4 > len(raw):
            raise BrokenStream(f"{name}: a string of {end - offset - 4} bytes in a tensor of {len(raw)} bytes")
        try:
            strings.append(raw[offset + 4 : end].decode())
        except UnicodeDecodeError as error:
            raise BrokenStream(f"{name}: not UTF-8: {error}") from error
        offset = end
    return strings


def _places(outputs: Mapping[str, list[Any]], name: str) -> tuple[Any, ...]:
    return tuple(place for text in outputs.get(name, ()) for place in json.loads(text))


def _count(outputs: Mapping[str, list[Any]], name: str) -> int | None:
    values = outputs.get(name)
    return int(values[0]) if values else None
