"""What a client may ask its output to follow, turned into a grammar of llguidance.

    json             any JSON object; takes no text
    json_schema      a JSON Schema (draft 2020-12, what llguidance implements of it), as JSON text
    regex            Rust's regular expressions (no look-around, no back-references); the whole output must match
    ebnf_grammar     llguidance's variant of Lark (`start: ...`), or llama.cpp's GBNF (`root ::= ...`)
    choice           a JSON list of strings, one of which is the whole output

JSON comes on one line: a comma or colon may be followed by one blank, and no other whitespace is allowed, so that a
small model cannot fill its answer with it. Keys come in the order of the schema, and one that the schema does not name
may be repeated.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from backend.errors import one_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_CHOICES = 1024
_MAX_REASON_CHARACTERS = 200

_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}
_OPTIONS_KEY = "x-guidance"
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)

# Per matcher. The first fuel also bounds the bytes that can be forced in one go (to between a quarter and a half of
# it), the number of lexer states its memory (about 1 kB each). Precomputing would make compiling slower and decoding
# hardly faster.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


class GuideKind(StrEnum):
    """The values of `guided_decoding_guide_type`."""

    JSON = "json"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF_GRAMMAR = "ebnf_grammar"
    CHOICE = "choice"


def to_grammar(kind: GuideKind, text: str) -> str:
    """Turn a guide into llguidance's own notation; whether that compiles is for `new_matcher` to say.

    ValueError or RecursionError says why it cannot be one.
    """
    match kind:
        case GuideKind.JSON:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', None, _JSON_OPTIONS)
        case GuideKind.JSON_SCHEMA:
            return _schema_grammar(text)
        case GuideKind.REGEX:
            return LLMatcher.grammar_from_regex(text)
        case GuideKind.EBNF_GRAMMAR:
            return _lark_grammar(_from_gbnf(text) if _GBNF_RULE.search(text) else text)
        case GuideKind.CHOICE:
            return _choice_grammar(text)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of `grammar`, with a lexer of its own; `problem_of` says whether it is one."""
    # NOTE: never deep_copy() one matcher for several sequences: copies share one lexer, whose limits would then be used
    # up by all of them, and what a sequence may do would depend on the others.
    return LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)


def problem_of(matcher: LLMatcher) -> str:
    """Why the matcher cannot go on, in llguidance's words and one line; empty when it can."""
    return shorten(matcher.get_error()) if matcher.is_error() else ""


def shorten(reason: str) -> str:
    """The line of a long message that says what is wrong."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    line = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "unknown reason")
    if line.startswith("NoExtension"):
        return "no text can follow"
    return one_line(line if len(line) <= _MAX_REASON_CHARACTERS else f"{line[:_MAX_REASON_CHARACTERS]}...")


def _schema_grammar(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("a JSON Schema must be an object")
    if _OPTIONS_KEY in schema:
        raise ValueError(f"{_OPTIONS_KEY} is not supported")
    return LLMatcher.grammar_from_json_schema(text, None, _JSON_OPTIONS)


def _from_gbnf(text: str) -> str:
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # the converter raises plain Exception
        raise ValueError(str(error)) from error


def _lark_grammar(lark: str) -> str:
    # Wrapped, because a bare text that begins with a brace would be taken for another notation.
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _choice_grammar(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("must be a JSON list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError(f"must have 1 to {MAX_CHOICES} choices, got {len(choices)}")
    for index, choice in enumerate(choices):
        if not choice.isascii() and any("\ud800" <= character <= "\udfff" for character in choice):
            raise ValueError(f"choice {index} is not Unicode text: it has a lone surrogate")
    # An upper-case name makes one lexeme of all choices; Lark's strings are JSON's.
    literals = (json.dumps(choice) for choice in dict.fromkeys(choices))
    return _lark_grammar("start: CHOICE\nCHOICE: " + " | ".join(literals))
