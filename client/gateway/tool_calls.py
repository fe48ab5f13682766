"""Tool calls out of an answer: what stands behind the control token [TOOL_CALLS], read while it comes.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, ...]

The token is recognised by its id, so a text that begins with a bracket stays a text. Names come whole, arguments as they
are made. What is no such list is given back as content.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOOL_CALLS_ID = 9
"""[TOOL_CALLS] in Tekken of version 3 (mistral-common, data/tekken_240718.json: its tenth special token)."""

_ID_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 9
_BLANKS = " \t\r\n"
_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"\s*:\s*')
_PART_OF_KEY = re.compile(r'"(?:[^"\\]|\\.)*(?:\\|"\s*)?')
_decoder = json.JSONDecoder()


def new_call_id() -> str:
    """Nine letters and digits, which is what Mistral's template wants to see again."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))


@dataclass(frozen=True)
class ToolEvent:
    """One step of reading: the call `index` begins (`name`) or goes on (`arguments`), or it is `content` after all."""

    index: int = 0
    name: str = ""
    arguments: str = ""
    content: str = ""


class _NotACall(Exception):
    pass


class ToolCallReader:
    """Reads the text behind [TOOL_CALLS]; at most `max_calls` calls are given, further ones are passed over."""

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._state = "list"
        self._rest = ""  # not read yet
        self._held = ""  # read, but in no event yet
        self._index = 0
        self._key = ""
        self._name = ""
        self._early_arguments = ""  # came before the name
        self._has_arguments = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    @property
    def num_calls(self) -> int:
        """Calls that were given, the last perhaps unfinished."""
        num_begun = self._index + bool(self._name)
        return num_begun if self._max_calls is None else min(num_begun, self._max_calls)

    def feed(self, text: str) -> list[ToolEvent]:
        """What `text`, the next piece, adds."""
        if self._state == "broken":
            return [ToolEvent(content=text)] if text else []
        self._rest += text
        events: list[ToolEvent] = []
        try:
            for event in self._read():
                self._held = ""
                if self._max_calls is None or event.index < self._max_calls:
                    events.append(event)
        except _NotACall:
            self._state = "broken"
            events.append(ToolEvent(content=self._held + self._rest))
        return events

    def finish(self) -> list[ToolEvent]:
        """The answer is over: without any call, what was read is content. (A later call without a name is none.)"""
        content = self._held + self._rest
        return [ToolEvent(content=content)] if content and not self.num_calls and self._state != "broken" else []

    def _read(self) -> Iterator[ToolEvent]:
        """Go on as far as the text reaches."""
        while self._rest:
            if self._state == "arguments":
                yield from self._given(self._take(self._num_argument_characters()))
                if not self._depth:
                    self._state = "behind value"
                continue
            self._take(len(self._rest) - len(self._rest.lstrip(_BLANKS)))
            if not self._rest:
                return
            match self._state:
                case "list":
                    self._expect("[", "call")
                case "call":
                    self._expect("{", "key")
                case "key":
                    if not self._read_key():
                        return
                case "value" if self._key == "arguments" and self._rest.startswith("{"):
                    self._has_arguments = True
                    self._state = "arguments"
                case "value":
                    found = self._value()
                    if not found:
                        return
                    self._state = "behind value"
                    yield from self._on_value(found[0])
                case "behind value":
                    if self._rest.startswith(","):
                        self._expect(",", "key")
                    else:
                        self._expect("}", "behind call")
                        yield from self._end_of_call()
                case "behind call":
                    if self._rest.startswith(","):
                        self._expect(",", "call")
                    else:
                        self._expect("]", "end")
                        self._held = ""
                case _:
                    raise _NotACall

    def _take(self, num_characters: int) -> str:
        taken, self._rest = self._rest[:num_characters], self._rest[num_characters:]
        self._held += taken
        return taken

    def _expect(self, character: str, next_state: str) -> None:
        if not self._rest.startswith(character):
            raise _NotACall
        self._take(1)
        self._state = next_state

    def _read_key(self) -> bool:
        """Read `"key":` if it is all there."""
        found = _KEY.match(self._rest)
        if found is None:
            if not _PART_OF_KEY.fullmatch(self._rest):
                raise _NotACall
            return False
        self._key = found[1]
        self._take(found.end())
        self._state = "value"
        return True

    def _value(self) -> tuple[Any] | None:
        """The JSON value at the front if it is all there."""
        try:
            value, end = _decoder.raw_decode(self._rest)
        except (ValueError, RecursionError):
            if self._rest[0] not in '"{[-0123456789tfn':
                raise _NotACall from None
            return None
        if end == len(self._rest) and not isinstance(value, (str, dict, list)):
            return None  # a number may go on
        self._take(end)
        return (value,)

    def _on_value(self, value: Any) -> Iterator[ToolEvent]:
        if self._key == "name":
            if not isinstance(value, str) or not value or self._name:
                raise _NotACall
            self._name = value
            yield ToolEvent(self._index, name=value)
            yield from self._given(self._early_arguments)
        elif self._key == "arguments":
            self._has_arguments = True
            yield from self._given(value if isinstance(value, str) else json.dumps(value))

    def _given(self, arguments: str) -> Iterator[ToolEvent]:
        if not self._name:
            self._early_arguments += arguments
        elif arguments:
            yield ToolEvent(self._index, arguments=arguments)

    def _num_argument_characters(self) -> int:
        """How much of the rest belongs to the object `arguments`: up to its closing brace, or all."""
        for position, character in enumerate(self._rest):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return position + 1
        return len(self._rest)

    def _end_of_call(self) -> Iterator[ToolEvent]:
        if not self._name:
            raise _NotACall
        if not self._has_arguments:
            yield ToolEvent(self._index, arguments="{}")
        self._index += 1
        self._held = self._name = self._early_arguments = ""
        self._has_arguments = False
