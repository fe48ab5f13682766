"""Chat messages and tools as OpenAI clients write them, checked strictly: what the model would never see is refused.

Only shapes are checked here (keys, types, JSON); roles and their order are mistral-common's business.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec

from backend.errors import RequestError, one_line, shown

MAX_NESTING = 64
MAX_NAMES = 100

NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class _Object(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class TextPart(_Object, frozen=True, tag="text", tag_field="type"):
    """One piece of a content given as a list; any other type (images, audio) is refused."""

    text: str


Content = str | Annotated[list[TextPart], msgspec.Meta(min_length=1)]


class CalledFunction(_Object, frozen=True):
    """Which function the assistant called; `arguments` is JSON in a string, or an object."""

    name: str
    arguments: str | dict[str, Any]


class Call(_Object, frozen=True):
    """One tool call of the assistant."""

    id: NonEmpty
    function: CalledFunction
    type: Literal["function"] = "function"


class _Turn(_Object, frozen=True, tag_field="role"):
    pass


class SystemTurn(_Turn, frozen=True, tag="system"):
    """Instructions; `name` has no place in the template."""

    content: Content
    name: None = None


class DeveloperTurn(SystemTurn, frozen=True, tag="developer"):
    """OpenAI's newer name of the system role."""


class UserTurn(_Turn, frozen=True, tag="user"):
    """What the user says."""

    content: Content
    name: None = None


class AssistantTurn(_Turn, frozen=True, tag="assistant"):
    """What the model said; `prefix` asks it to go on with this very text.

    The last fields come along, empty, when a client sends back what an OpenAI server gave it.
    """

    content: Content | None = None
    tool_calls: list[Call] | None = None
    prefix: bool = False
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None
    annotations: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None


class ToolTurn(_Turn, frozen=True, tag="tool"):
    """The result of the call with the id `tool_call_id`, which also says which tool it was."""

    content: Content
    tool_call_id: NonEmpty
    name: str | None = None


Turn = SystemTurn | DeveloperTurn | UserTurn | AssistantTurn | ToolTurn


class DefinedFunction(_Object, frozen=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(_Object, frozen=True):
    """One tool offered to the model."""

    type: Literal["function"]
    function: DefinedFunction


def parse_messages(text: str) -> list[Turn]:
    """Read the JSON list of chat messages; RequestError("messages", ...) says where and why it cannot be used."""
    turns = _converted("messages", text, list[Turn])
    for index, turn in enumerate(turns[:-1]):
        if isinstance(turn, AssistantTurn) and turn.prefix:
            raise RequestError(
                "messages",
                f"`prefix` may be true in the last of {len(turns)} messages only but is in messages[{index}]",
            )
    return turns


def parse_tools(text: str) -> list[ToolDefinition]:
    """Read the JSON list of tools; RequestError("tools", ...) says where and why it cannot be used."""
    tools = _converted("tools", text, list[ToolDefinition])
    for index, tool in enumerate(tools):
        if tool.function.strict:
            raise RequestError("tools", f"tools[{index}].function.strict must be false or null: true is not supported")
        _check_name_lists(tool.function.parameters)
    return tools


def _check_name_lists(parameters: object) -> None:
    # jsonschema looks for equal entries in these lists, pair by pair if they are not all names: seconds for 100 KB.
    level = [parameters]
    while level:
        objects = [value for value in level if isinstance(value, dict)]
        for schema in objects:
            dependencies = schema.get("dependencies")
            for names in (schema.get("type"), *(dependencies.values() if isinstance(dependencies, dict) else ())):
                if isinstance(names, list) and len(names) > MAX_NAMES:
                    raise RequestError(
                        "tools",
                        f"a `type` or `dependencies` may list at most {MAX_NAMES} names but one lists {len(names)}",
                    )
        level = _inner_values(level)


_Converted = TypeVar("_Converted")


def _converted(field: str, text: str, kind: type[_Converted]) -> _Converted:
    value = _parsed(field, text)
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        problem = str(error).replace("`$", f"`{field}")
        if ".content[" in problem and problem.endswith(".type`"):
            problem += ": only content of type 'text' is supported"
        raise unusable(field, problem) from None


def _parsed(field: str, text: str) -> object:
    try:
        value: object = json.loads(
            text, object_pairs_hook=_object_of, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise _too_deep(field) from None
    except ValueError as error:  # JSONDecodeError is one
        raise unusable(field, f"is not valid JSON: {error}") from None
    _check_nesting(field, value)
    if not text.isascii() or "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = ord(error.object[error.start])
            raise RequestError(field, f"is not Unicode text: it has the lone surrogate U+{surrogate:04X}") from None
    return value


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} occurs twice in one object")
            seen.add(key)
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(digits)} is out of range")
    return number


def _check_nesting(field: str, value: object) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        level = _inner_values(level)
        if not level:
            return
    if any(isinstance(inner, (dict, list)) for inner in level):
        raise _too_deep(field)


def _inner_values(values: list[object]) -> list[object]:
    return [
        inner
        for outer in values
        if isinstance(outer, (dict, list))
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]


def _too_deep(field: str) -> RequestError:
    return RequestError(field, f"is nested too deeply: at most {MAX_NESTING} levels")


def unusable(field: str, problem: str) -> RequestError:
    """The error for a problem told by a library, which may repeat a hostile input at any length."""
    return RequestError(field, one_line(problem))
