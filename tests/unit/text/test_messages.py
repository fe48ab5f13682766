from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import RequestError
from backend.text.chat import ChatTemplate
from backend.text.messages import MAX_NESTING, parse_messages, parse_tools
from tests.unit.text.samples import WEATHER

USER = '{"role": "user", "content": "x"}'


def call(arguments: str) -> str:
    turn = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}}]}
    return f'[{USER}, {json.dumps(turn)}, {{"role": "tool", "tool_call_id": "a", "content": "x"}}]'


BAD_MESSAGES = {
    "no text": ("", "not valid JSON"),
    "no JSON": ("[", "not valid JSON"),
    "more than JSON": (f"[{USER}] x", "not valid JSON: Extra data"),
    "a byte order mark": (f"\ufeff[{USER}]", "not valid JSON: Unexpected UTF-8 BOM"),
    "null": ("null", "Expected `array`, got `null`"),
    "no list": (USER, "Expected `array`, got `object`"),
    "an empty list": ("[]", "at least one message"),
    "no object": ("[1]", r"Expected `object`, got `int` - at `messages\[0\]`"),
    "no role": ('[{"content": "x"}]', "missing required field `role`"),
    "an unknown role": ('[{"role": "bot", "content": "x"}]', r"'bot' - at `messages\[0\].role`"),
    "no content": ('[{"role": "user"}]', "missing required field `content`"),
    "null content": ('[{"role": "user", "content": null}]', r"got `null` - at `messages\[0\].content`"),
    "no parts": ('[{"role": "user", "content": []}]', "length >= 1"),
    "content not text": ('[{"role": "user", "content": 5}]', "got `int`"),
    "an image": (
        '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}]}]',
        r"'image_url' - at `messages\[0\].content\[0\].type`: only content of type 'text'",
    ),
    "an unknown key": ('[{"role": "user", "content": "x", "contents": 1}]', "unknown field `contents`"),
    "a name": ('[{"role": "user", "content": "x", "name": "Ann"}]', r"Expected `null`, got `str` - at .*name"),
    "a key twice": ('[{"role": "user", "content": "x", "content": "y"}]', "'content' occurs twice"),
    "NaN": ('[{"role": "user", "content": NaN}]', "NaN is no JSON number"),
    "Infinity": ('[{"role": "user", "content": -Infinity}]', "-Infinity is no JSON number"),
    "a number out of range": ('[{"role": "user", "content": 1e999}]', "'1e999' is out of range"),
    "a huge integer": (f'[{{"role": "user", "content": {"9" * 5_000}}}]', "4300 digits"),
    "a surrogate": ('[{"role": "user", "content": "\\ud83d"}]', r"lone surrogate U\+D83D"),
    "a raw surrogate": ('[{"role": "user", "content": "\udc00"}]', r"lone surrogate U\+DC00"),
    "a surrogate in a key": ('[{"role": "user", "\\udc00": "x"}]', r"lone surrogate U\+DC00"),
    "deep nesting": ("[" * 100_000 + "]" * 100_000, f"at most {MAX_NESTING} levels"),
    "65 levels": ("[" * 65 + "]" * 65, f"at most {MAX_NESTING} levels"),
    "the assistant first and last": ('[{"role": "assistant", "content": "x"}]', "must start with a user"),
    "the assistant last": (f'[{USER}, {{"role": "assistant", "content": "x"}}]', "last role"),
    "a tool after the user": (f'[{USER}, {{"role": "tool", "tool_call_id": "a", "content": ""}}]', "role 'tool' after"),
    "an early prefix": (
        f'[{USER}, {{"role": "assistant", "content": "x", "prefix": true}}, {USER}]',
        r"last of 3 messages only but is in messages\[1\]",
    ),
    "calls without results": (call("{}").rsplit(", {", 1)[0] + "," + USER + "]", "number of function calls"),
    "an empty call id": (call("{}").replace('"a"', '""'), "length >= 1"),
    "a bad function name": (call("{}").replace('"f"', '"f g"'), "Function name was f g"),
    "deep arguments": (call("[" * 50_000), "nested too deeply"),
    "a surrogate in arguments": (call('"\\udfff"'), r"lone surrogate U\+DFFF"),
    "a huge integer in arguments": (call("9" * 5_000), "4300 digits"),
    "content beside calls": (
        f'[{USER}, {{"role": "assistant", "content": "x"}}, {call("{}")[len(USER) + 3 :]}',
        "tool calls and content",
    ),
}

BAD_TOOLS = {
    "no JSON": ("{", "not valid JSON"),
    "null": ("null", "Expected `array`, got `null`"),
    "no list": ("{}", "Expected `array`"),
    "no object": ("[1]", r"got `int` - at `tools\[0\]`"),
    "no type": ('[{"function": {"name": "f"}}]', "missing required field `type`"),
    "another type": ('[{"type": "retrieval", "function": {"name": "f"}}]', "'retrieval'"),
    "no function": ('[{"type": "function"}]', "missing required field `function`"),
    "a bad name": ('[{"type": "function", "function": {"name": "a b"}}]', "Function name was a b"),
    "an unknown key": ('[{"type": "function", "function": {"name": "f", "params": {}}}]', "unknown field `params`"),
    "a surrogate": ('[{"type": "function", "function": {"name": "f", "description": "\\ud800"}}]', r"U\+D800"),
    "a raw surrogate": ('[{"type": "function", "function": {"name": "f", "description": "\udfff"}}]', r"U\+DFFF"),
    "a long name": (
        f'[{{"type": "function", "function": {{"name": "{"f" * 5_000}"}}}}]',
        r"Function name was f+\.\.\. \(\d+ characters\)$",
    ),
    "strict": ('[{"type": "function", "function": {"name": "f", "strict": true}}]', r"tools\[0\].function.strict"),
}

BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "an unknown type": ({"type": "text"}, "schema: 'text' is not valid"),
    "required is no list": ({"required": 5}, "5 is not of type 'array'"),
    "a bad regular expression": ({"pattern": "("}, "is not a 'regex'"),
    "an impossible repetition": ({"pattern": "a{99999999999999999999}"}, "repetition number is too large"),
    "a deep regular expression": ({"pattern": "(" * 3_000 + ")" * 3_000}, "nested too deeply"),
    "deep nesting": (json.loads('{"items":' * 61 + "{}" + "}" * 61), f"at most {MAX_NESTING} levels"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_refused(chat: ChatTemplate, name: str) -> None:
    messages_json, problem = BAD_MESSAGES[name]
    with pytest.raises(RequestError, match=problem) as caught:
        chat.encode(messages_json, None)
    assert caught.value.field == "messages"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_bad_tools_are_refused(chat: ChatTemplate, name: str) -> None:
    tools_json, problem = BAD_TOOLS[name]
    with pytest.raises(RequestError, match=problem) as caught:
        chat.encode(f"[{USER}]", tools_json)
    assert caught.value.field == "tools"


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_bad_schemas_are_refused(chat: ChatTemplate, name: str) -> None:
    parameters, problem = BAD_SCHEMAS[name]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(RequestError, match=problem) as caught:
        chat.encode(f"[{USER}]", json.dumps(tools))
    assert caught.value.field == "tools"


def test_the_deepest_allowed_nesting() -> None:
    turn = call("{}").replace('"{}"', "{" + '"a":{' * (MAX_NESTING - 6) + "}" * (MAX_NESTING - 5))
    assert len(parse_messages(turn)) == 3
    with pytest.raises(RequestError, match="levels"):
        parse_messages(turn.replace('"a":{}', '"a":{"b":{}}'))


@pytest.mark.parametrize("key", ["type", "dependencies", "keys"])
def test_hostile_input_costs_no_seconds(chat: ChatTemplate, key: str) -> None:
    names = [entry for index in range(6_000) for entry in (index, f"a{index}", index + 0.5)]
    parameters: dict[str, Any] = {"type": names} if key == "type" else {"dependencies": {"a": names}}
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    if key == "keys":
        tools = "[{" + ",".join(f'"{index}":0' for index in range(100_000)) + ',"99999":0}]'
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"at most 100 names but one lists 18000|'99999' occurs twice"):
        chat.encode(f"[{USER}]", tools)
    assert time.perf_counter() - start < 5  # without the checks: 28 s, 40 s, minutes


def test_no_tools_is_the_same_as_an_empty_list(chat: ChatTemplate) -> None:
    assert parse_tools("[]") == []
    assert chat.encode(f"[{USER}]", "[]") == chat.encode(f"[{USER}]", None)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["user", "tool"])
)
KEYS = st.sampled_from(
    [
        "role",
        "content",
        "name",
        "tool_calls",
        "id",
        "function",
        "type",
        "arguments",
        "text",
        "prefix",
        "parameters",
        "x",
    ]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@st.composite
def damaged(draw: st.DrawFn, good: Any) -> Any:
    """`good` with one value somewhere inside replaced by any other."""
    if isinstance(good, dict) and good and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(good)))
        return good | {key: draw(damaged(good[key]))}
    if isinstance(good, list) and good and draw(st.booleans()):
        index = draw(st.integers(0, len(good) - 1))
        return [*good[:index], draw(damaged(good[index])), *good[index + 1 :]]
    return draw(VALUES)


GOOD_MESSAGES = json.loads(call('{"a": 1}'))


@given(
    messages=VALUES | damaged(GOOD_MESSAGES), tools=st.none() | VALUES | damaged([WEATHER]), ascii_only=st.booleans()
)
@settings(max_examples=500)
def test_any_json_is_refused_in_one_way(chat: ChatTemplate, messages: Any, tools: Any, ascii_only: bool) -> None:
    tools_json = None if tools is None else json.dumps(tools, ensure_ascii=ascii_only)
    ids, field = [1], "messages"
    try:
        ids = chat.encode(json.dumps(messages, ensure_ascii=ascii_only), tools_json)
    except RequestError as error:
        field = error.field
    assert field in ("messages", "tools")
    assert ids[0] == 1
    assert ids.count(1) == 1


@given(text=st.text(st.sampled_from('[]{}":,\\u0de1. \ntrueroleuserNaN-'), max_size=40) | st.text(max_size=40))
@settings(max_examples=300)
def test_any_text_is_refused_in_one_way(chat: ChatTemplate, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat.encode(text, None)
    assert caught.value.field == "messages"
    with pytest.raises(RequestError) as caught:
        chat.encode(f"[{USER}]", "[[" + text)
    assert caught.value.field == "tools"
