"""A parser of hostile bytes, right inputs of it, and how these are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_safetensors, json_text

Kind = Literal["json", "safetensors", "text"]
_SHOWN_BYTES = 200


class Case:
    """Bytes to parse, shown in short: they may be long. (Of a dataclass hypothesis would show the fields.)"""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __repr__(self) -> str:
        return f"{len(self.content)} bytes: {self.content[:_SHOWN_BYTES]!r}"


@dataclass(frozen=True)
class Parser:
    """`parse` takes each of `samples` as it is; `kind` says what they are, and so how they are damaged."""

    samples: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    kind: Kind = "json"

    def __repr__(self) -> str:
        return f"a parser of {self.kind}"

    def damaged(self) -> st.SearchStrategy[Case]:
        """Damaged copies of the samples."""
        return _damaged(self)


@st.composite
def _damaged(draw: st.DrawFn, parser: Parser) -> Case:
    sample = draw(st.sampled_from(parser.samples))
    if parser.kind == "safetensors":
        return Case(damaged_safetensors(draw, sample))
    if parser.kind == "text" or draw(st.integers(0, 2)) == 0:  # damaged text is mostly not JSON any more
        return Case(damaged_bytes(draw, sample))
    return Case(json_text(damaged_json(draw, json.loads(sample))))
