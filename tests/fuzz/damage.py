"""Right inputs damaged in every way that files and clients are damaged: bytes, JSON values, and headers of safetensors files.

These are functions of hypothesis's `draw`, not strategies: of those it shows every argument in full.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

_DEEP, _HUGE, _TWICE = "<deep>", "<huge>", "<twice>"
_DEPTH = 50_000
_SPECIAL_TEXTS = {
    json.dumps(_DEEP): "[" * _DEPTH + "]" * _DEPTH,
    json.dumps(_HUGE): "9" * 5000,
    json.dumps(_TWICE): '{"a": 1, "a": 2}',
}
"""What Python's values cannot say, put into the JSON text: a nest, a number of 5,000 digits, a key that is there twice."""

NUMBERS = (
    *(0, 1, -1, 2, 15, 16, 17, 64, 255, 256, 4095, 4096, 2**18, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64, -(2**64), 10**30, 10**400, 0.5, -0.0, 1.0, 1e-300, 1e300, 3.4e38, -1e39),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "a", "true", "0", "null", "é", "👩‍👩‍👧", "\0", "a\0b", "\n", "\ud800", "a\udfff"),
    *("\u202e", "\ufeff", "%s%n", "{0}", ".", "..", "~", "a/b", "a\\b", "x" * 300),
    *("../x", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin"),
    *("re:(", "re:(a+)+$", "re:" + "(" * 5000, "re:a{99999999999}", "re:(.*)*x", "*" * 60, "x" * 70_000),
    *("BF16", "F32", "F8_E4M3", "I64", "float8", "MistralForCausalLM", "default", _DEEP, _HUGE, _TWICE),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
)
json_values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def json_text(value: object) -> bytes:
    """The JSON of a damaged value."""
    text = json.dumps(value)
    for placeholder, special in _SPECIAL_TEXTS.items():
        text = text.replace(placeholder, special)
    return text.encode()


def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a JSON value with one to three of its places replaced, removed, renamed, doubled or moved."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        copy = _damaged_once(draw, copy)
    return copy


def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with up to three pieces cut off, overwritten, inserted, removed or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 64)))
        match draw(st.integers(0, 5)):
            case 0:
                content = content[:start]
            case 1:
                content = content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[end:]
            case 2:
                content = content[:start] + content[end:]
            case 3:
                content = content[:end] + content[start:end] * draw(st.integers(1, 40)) + content[end:]
            case 4:
                content = content[:start] + draw(st.sampled_from(_TOKENS)) + content[start:]
            case _:
                content = draw(st.sampled_from(_FRAMES))(content)
    return content


def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header is damaged, whose length lies about it, or whose values are."""
    length = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + length], content[8 + length :]
    match draw(st.integers(0, 3)):
        case 0:
            header = json_text(damaged_json(draw, json.loads(header)))
        case 1:
            header = damaged_bytes(draw, header)
        case 2:
            values = damaged_values(draw, values)
        case _:
            return damaged_bytes(draw, content)
    length = len(header)
    if draw(st.integers(0, 9)) == 0:
        length = draw(st.sampled_from((0, 1, length - 1, length + 1, len(content), 10**8, 10**8 + 1, 2**63, 2**64 - 1)))
    return (length % 2**64).to_bytes(8, "little") + header + values


def damaged_values(draw: st.DrawFn, values: bytes) -> bytes:
    """Numbers overwritten by NaNs, infinities and the largest there are, of every dtype; or values cut off or added."""
    place = draw(st.integers(0, max(0, len(values) - 4))) // 4 * 4
    odd = draw(
        st.sampled_from((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\x7f\x7f\x7f\x7f"))
    )
    return draw(
        st.sampled_from(
            (
                values[:place] + odd + values[place + 4 :],
                values[:-1],
                values + b"\0",
                values[:place],
                b"\xff" * len(values),
            )
        )
    )


_TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"null",
        b"NaN",
        b"-",
        b"1e999",
        b"\\ud800",
        b"\\",
        b"0" * 30,
        b"9" * 30,
    ),
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80"),
)
_FRAMES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: b"",
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.decode("latin-1").encode("utf-16"),
    lambda content: content + content,
    lambda content: b"[" * _DEPTH + content,
    lambda content: b"version https://git-lfs.github.com/spec/v1\n" + content,
    lambda content: content.replace(b'"', b"'"),
)


def _damaged_once(draw: st.DrawFn, value: Any) -> Any:
    """Walk down to a random place and change it."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(json_values)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    match draw(st.integers(0, 7)):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = value[key]
        case 2 if isinstance(value, dict):
            value[draw(st.sampled_from(keys))] = value[key]
        case 3 if isinstance(value, dict):
            value[draw(st.text(max_size=8))] = draw(json_values)
        case 1 | 2 | 3:
            assert isinstance(value, list)
            value.insert(key, draw(st.sampled_from(value)))
        case 4:
            value[key] = draw(json_values)
        case _:
            value[key] = _damaged_once(draw, value[key])
    return value
