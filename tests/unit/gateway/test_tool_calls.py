"""Tool calls read out of a text that is cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.tool_calls import ToolCallReader, new_call_id

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.text(min_size=1, max_size=8), "arguments": st.dictionaries(st.text(max_size=4), JSON, max_size=3)},
        optional={"id": st.text(max_size=9)},
    ),
    min_size=1,
    max_size=3,
)


def read(text: str, cuts: list[int], max_calls: int | None = None) -> tuple[list[tuple[str, str]], str]:
    """Calls and content of a text fed in pieces; every call must begin with its name."""
    reader, content = ToolCallReader(max_calls), ""
    calls: list[tuple[str, str]] = []
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    for event in [event for piece in pieces for event in reader.feed(piece)] + reader.finish():
        content += event.content
        if event.name:
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif event.arguments:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    assert reader.num_calls == len(calls)
    return calls, content


@given(CALLS, st.lists(st.integers(0, 10_000), max_size=12), st.booleans(), st.booleans())
def test_calls_are_read_however_they_are_cut(
    calls: list[dict[str, object]], cuts: list[int], is_ascii: bool, is_spaced: bool
) -> None:
    text = json.dumps(calls, ensure_ascii=is_ascii, indent=1 if is_spaced else None)
    found, content = read(text, cuts)
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == [
        (call["name"], call["arguments"]) for call in calls
    ]


def test_arguments_come_before_their_end() -> None:
    reader = ToolCallReader()
    events = reader.feed('[{"name": "f", "arguments": {"text": "once upon')
    assert [(event.name, event.arguments) for event in events] == [("f", ""), ("", '{"text": "once upon')]
    (event,) = reader.feed(" a time")
    assert event.arguments == " a time"


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_other_orders_and_spellings(step: int) -> None:
    text = '[{"arguments": {"a": 1}, "name": "f"}, {"name": "g", "arguments": "{\\"b\\": 2}"}, {"name": "h"}]'
    found, content = read(text, list(range(0, len(text), step)))
    assert (found, content) == ([("f", '{"a": 1}'), ("g", '{"b": 2}'), ("h", "{}")], "")


@pytest.mark.parametrize(
    "text", ["hello", "[1, 2]", '[{"name": 3}]', '[{"x": "y"}]', '{"name": "f"}', "[", '[{"na', "[]", '["name"]']
)
@pytest.mark.parametrize("step", [1, 1000])
def test_what_is_no_call_is_content(text: str, step: int) -> None:
    assert read(text, list(range(0, len(text), step))) == ([], text)


def test_text_behind_the_calls_is_content() -> None:
    assert read('[{"name": "f", "arguments": {}}] and more', [5, 20]) == ([("f", "{}")], " and more")


def test_cut_off_calls_keep_what_there_is() -> None:
    assert read('[{"name": "f", "arguments": {"a": [1, 2', [9]) == ([("f", '{"a": [1, 2')], "")
    assert read('[{"name": "f", "arguments": {}}, {"na', [9]) == ([("f", "{}")], "")


def test_calls_beyond_the_most_are_passed_over() -> None:
    text = json.dumps([{"name": name, "arguments": {}} for name in "abc"])
    assert read(text, [7, 30, 44], max_calls=1) == ([("a", "{}")], "")


def test_ids_are_what_the_template_wants() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(each) == 9 and each.isascii() and each.isalnum() for each in ids)
