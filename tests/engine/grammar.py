"""A grammar small enough to read: places that each allow some ids or force one, then the end.

    "2,3 =4 =5 6,7" is 2 or 3, then 4 and 5 for certain, then 6 or 7

As with a real grammar, a forced id is the only one that its mask allows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from backend.engine.request import GuideSpec
from backend.errors import RequestError
from tests.engine.device import EOS_ID


def guide_spec(text: str) -> GuideSpec:
    return GuideSpec("places", text)


def forced_at(places: tuple[str, ...], index: int) -> int | None:
    return int(places[index][1:]) if index < len(places) and places[index].startswith("=") else None


def allowed_at(places: tuple[str, ...], index: int) -> set[int]:
    """What a sequence may have at a place: what is forced, what may be chosen, or its end."""
    forced_id = forced_at(places, index)
    if forced_id is not None:
        return {forced_id}
    return {int(part) for part in places[index].split(",")} if index < len(places) else {EOS_ID}


class PlacesMatcher:
    def __init__(self, places: tuple[str, ...]) -> None:
        self._places = places
        self._index = 0

    def accept(self, token_id: int) -> None:
        assert token_id in allowed_at(self._places, self._index), f"id {token_id} at place {self._index}"
        self._index += 1

    def mask(self) -> npt.NDArray[np.int32]:
        ids = allowed_at(self._places, self._index)
        return np.array([sum(1 << token_id for token_id in ids)], dtype=np.int32)

    def forced_ids(self) -> tuple[int, ...]:
        ids: list[int] = []
        while (forced_id := forced_at(self._places, self._index + len(ids))) is not None:
            ids.append(forced_id)
        return tuple(ids)


class PlacesGuide:
    def __init__(self, text: str) -> None:
        self._places = tuple(text.split())

    def start(self) -> PlacesMatcher:
        return PlacesMatcher(self._places)


def compile_places(spec: GuideSpec) -> PlacesGuide:
    """The tests' compiler: `!` cannot be compiled."""
    if "!" in spec.text:
        raise RequestError("guided_decoding_guide", f"cannot be understood at {spec.text.index('!')}")
    return PlacesGuide(spec.text)
