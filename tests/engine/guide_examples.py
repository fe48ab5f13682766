"""Guides of every kind, and what says independently of them whether a text follows one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema

Follows = Callable[[str], bool]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "tags": {
            "type": "array",
            "items": {"enum": ["new", "old", "\u00fcber \u65e5\u672c", 'quo"te\\']},
            "maxItems": 4,
        },
        "address": {"$ref": "#/$defs/address"},
        "score": {"type": ["number", "null"], "minimum": -1.5, "exclusiveMaximum": 2},
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "since": {"type": "string", "format": "date"}},
            "required": ["street"],
            "additionalProperties": False,
        }
    },
}
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "left": {"$ref": "#/$defs/leaf"},
                "right": {"$ref": "#/$defs/leaf"},
            },
            "required": ["value"],
            "additionalProperties": False,
        },
        "leaf": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "tree": TREE,
    "number": {"type": "number", "minimum": -3, "maximum": 1000},
    "multiple": {"type": "integer", "multipleOf": 7},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    "union": {"anyOf": [{"type": "integer"}, {"type": "string", "format": "ipv4"}, {"const": {"a": [1, 2]}}]},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "anything": {"type": ["object", "array", "string", "number", "boolean", "null"]},
}
REGEXES = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-([0-2][0-9]|3[01])",
    "name": r"[A-Z][a-z]{1,9}( [A-Z][a-z]{1,9}){0,2}",
    "slash": r'a/b\\c"d\n?',
    "many": r"(x|yz){3,5}[^a-z]*",
    "greek": "[\u0370-\u03ff]{2,6}|[\u3040-\u309f]+",
    "any": r"(?s:.{0,40})",
    "maybe": r"(yes|no)?",
}
CHOICES = {
    "words": ["yes", "no", "yes, but", "yesterday"],
    "hard": [
        'a"b',
        "back\\slash",
        "line\nend",
        "tab\t",
        "del\x7f",
        "nul\x00",
        "/re.*/",
        "<s>",
        "[INST]",
        "%json",
        "",
        "  ",
        "\u2028",
    ],
    "scripts": [
        "\u00e9",
        "e\u0301",
        "\u65e5\u672c\u8a9e",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u0645\u0631\u062d\u0628\u0627",
    ],
    "one": ["The only answer there is."],
}
ARITHMETIC = (
    'start: sum\nsum: product (("+" | "-") product)*\nproduct: atom ("*" atom)*\natom: "(" sum ")" | /[1-9][0-9]{0,3}/'
)
GBNF = 'root ::= item ("," " "? item){1,3}\nitem ::= [a-c]+ | "<" [0-9] ">"  # comment\n'


def _matches(pattern: str) -> Follows:
    return lambda text: re.fullmatch(pattern, text) is not None


def _is_arithmetic(text: str) -> bool:
    if re.fullmatch(r"[-+*()0-9]+", text) is None:
        return False
    eval(compile(text, "output", "eval"), {"__builtins__": {}})  # SyntaxError fails the test
    return True


def follows_schema(schema: dict[str, Any]) -> Follows:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "ipv4"]))

    def follows(text: str) -> bool:
        validator.validate(json.loads(text))  # ValidationError fails the test
        return has_single_blanks(text)

    return follows


def has_single_blanks(text: str) -> bool:
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    return re.search(r"[\t\r\n]|(?<![,:]) | $", outside) is None


def guides() -> Iterator[tuple[str, str, str, Follows]]:
    yield "json", "json", "", lambda text: isinstance(json.loads(text), dict) and has_single_blanks(text)
    for name, schema in SCHEMAS.items():
        yield name, "json_schema", json.dumps(schema), follows_schema(schema)
    for name, pattern in REGEXES.items():
        yield name, "regex", pattern, _matches(pattern)
    for name, choices in CHOICES.items():
        yield name, "choice", json.dumps(choices), choices.__contains__
    yield "lark", "ebnf_grammar", ARITHMETIC, _is_arithmetic
    item = "(?:[a-c]+|<[0-9]>)"
    yield "gbnf", "ebnf_grammar", GBNF, _matches(f"{item}(?:, ?{item}){{1,3}}")
