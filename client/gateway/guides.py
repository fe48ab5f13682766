"""What an answer must follow: `response_format`, `guided_*` and `tool_choice` as one guide of the ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from client.gateway.errors import bad_request
from client.gateway.fields import ResponseFormat, SharedFields, made_tensor
from client.params import InputTensor


@dataclass(frozen=True)
class Guide:
    """A guide by the ensemble's names, and the parameter it came from."""

    kind: str
    text: str
    param: str

    def tensors(self) -> Iterator[InputTensor]:
        """The ensemble's two tensors."""
        yield made_tensor(self.param, "guided_decoding_guide_type", "BYTES", self.kind)
        if self.text:
            yield made_tensor(self.param, "guided_decoding_guide", "BYTES", self.text)

    def params(self) -> dict[str, str]:
        """Under which name to complain about it."""
        return {"guided_decoding_guide": self.param, "guided_decoding_guide_type": self.param}


def requested_guide(request: SharedFields, response_format: ResponseFormat | None) -> Guide | None:
    """The one guide a request asks for; ApiError for two."""
    found = [guide for guide in (_format_guide(response_format), *_extension_guides(request)) if guide is not None]
    if len(found) > 1:
        raise bad_request(found[1].param, f"cannot be combined with {found[0].param}: leave one of them out")
    return found[0] if found else None


def _format_guide(response_format: ResponseFormat | None) -> Guide | None:
    if response_format is None:
        return None
    schema = response_format.json_schema
    if response_format.type != "json_schema":
        if schema is not None:
            raise bad_request("response_format.json_schema", f"does not go with type {response_format.type}")
        return Guide("json", "", "response_format") if response_format.type == "json_object" else None
    if schema is None or schema.json_schema is None:
        missing = "json_schema" if schema is None else "json_schema.schema"
        raise bad_request(f"response_format.{missing}", "must be given with type json_schema, got none")
    return Guide("json_schema", json_text(schema.json_schema), "response_format")


def _extension_guides(request: SharedFields) -> Iterator[Guide]:
    if (schema := request.extension("guided_json")) is not None:
        text = schema if isinstance(schema, str) else json_text(schema)
        yield Guide("json_schema", text, "guided_json")
    if (regex := request.extension("guided_regex")) is not None:
        yield Guide("regex", regex, "guided_regex")
    if (choices := request.extension("guided_choice")) is not None:
        yield Guide("choice", json_text(choices), "guided_choice")
    if (grammar := request.extension("guided_grammar")) is not None:
        yield Guide("ebnf_grammar", grammar, "guided_grammar")


def tool_call_guide(tools: Sequence[tuple[str, dict[str, Any] | None]], *, is_parallel: bool) -> Guide:
    """What stands behind [TOOL_CALLS]: a list of at least one call, each of one of these tools (name, parameters)."""
    calls, definitions = [], {}
    for index, (name, parameters) in enumerate(tools):
        # The schema moves, so its references move along; its own definitions stay inside it.
        definitions[f"tool{index}"] = _moved(parameters or {"type": "object"}, f"#/$defs/tool{index}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool{index}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if not is_parallel:
        schema["maxItems"] = 1
    return Guide("json_schema", json_text(schema), "tools")


def json_text(value: Any) -> str:
    """JSON on one line; ApiError's cause is the caller's (a lone surrogate), so it is named by the caller."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise bad_request("body", f"holds text or a number that JSON cannot: {error}") from None


def _moved(schema: Any, place: str) -> Any:
    """A schema with every local reference prefixed by where it now stands."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }
