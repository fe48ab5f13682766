"""Log-probabilities as tensors: floats for the tokens that were drawn, JSON for the alternatives and for the prompt.

A JSON entry stands for one place in the text, the id that stands there and the most likely ones; `bytes` is what an id
means, as numbers, because an id need not be whole characters:

    {"id": 1234, "log_prob": -0.1, "rank": 1, "bytes": [72, 105],
     "top": [{"id": 1234, "log_prob": -0.1, "rank": 1, "bytes": [72, 105]}, ...]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from backend.engine.plan import TokenLogProbs
from backend.triton_adapter import tensors


class Alternative(msgspec.Struct):
    """One id that could have stood there."""

    id: int
    log_prob: float
    rank: int
    bytes: list[int] | None = None


class Place(msgspec.Struct):
    """One place in the text."""

    id: int
    log_prob: float
    rank: int
    top: list[Alternative]
    bytes: list[int] | None = None


_places = msgspec.json.Decoder(list[Place | None])


def drawn_tensors(
    token_ids: Sequence[int], log_probs: Sequence[TokenLogProbs], cumulated: float, *, has_alternatives: bool
) -> list[Any]:
    """`output_log_probs` [1, 1, n] and `cum_log_probs` [1, 1] FP32 of the ids of one response, `top_log_probs` if asked for.

    Of `token_ids` only the last n were drawn, behind those of an echoed prompt.
    """
    values = np.array([[[each.log_prob for each in log_probs]]], dtype=np.float32)
    made = [
        tensors.array_tensor("output_log_probs", values),
        tensors.array_tensor("cum_log_probs", np.array([[cumulated]], dtype=np.float32)),
    ]
    if has_alternatives:
        drawn = token_ids[len(token_ids) - len(log_probs) :]
        made.append(tensors.text_tensor("top_log_probs", _encode(list(map(_place, drawn, log_probs)))))
    return made


def prompt_tensor(token_ids: Sequence[int], log_probs: Sequence[TokenLogProbs]) -> Any:
    """`prompt_log_probs`: an entry for each prompt token; the first has none, since nothing stands before it."""
    return tensors.text_tensor("prompt_log_probs", _encode([None, *map(_place, token_ids[1:], log_probs)]))


def with_bytes(encoded: bytes, token_bytes: Sequence[bytes]) -> str:
    """JSON of places with the bytes of every id filled in; ValueError when it is something else, or an id is none."""
    try:
        places = _places.decode(encoded)
    except msgspec.DecodeError as error:
        raise ValueError(f"is no JSON of places: {error}") from error
    scored: list[Place | Alternative] = []
    for place in places:
        scored += [] if place is None else [place, *place.top]
    for each in scored:
        if not 0 <= each.id < len(token_bytes):
            raise ValueError(f"ids must be in [0, {len(token_bytes) - 1}], got {each.id}")
        each.bytes = list(token_bytes[each.id])
    return _encode(places)


def _place(token_id: int, log_probs: TokenLogProbs) -> Place:
    pairs = zip(log_probs.top_ids, log_probs.top_log_probs, strict=True)
    top = [Alternative(token_id, log_prob, rank) for rank, (token_id, log_prob) in enumerate(pairs, 1)]
    return Place(token_id, log_probs.log_prob, log_probs.rank, top)


def _encode(places: Sequence[Place | None]) -> str:
    return msgspec.json.encode(places).decode()
