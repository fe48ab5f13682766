from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterator

import pytest

from backend.engine import guide_checker
from backend.engine.guide import MAX_CACHED_GUIDES, MAX_GUIDE_BYTES
from backend.engine.guide_grammar import MAX_CHOICES, GuideKind, to_grammar
from backend.errors import RequestError
from tests.engine.guide_walk import DEMO_VOCAB_SIZE, Served, serve


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory, DEMO_VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "text", "field", "problem"),
    [
        (
            "xml",
            "a",
            "guided_decoding_guide_type",
            "must be one of json, json_schema, regex, ebnf_grammar, choice, got 'xml'",
        ),
        ("", "a", "guided_decoding_guide_type", "must be one of"),
        ("json", "{}", "guided_decoding_guide", "must be empty for json"),
        ("regex", "", "guided_decoding_guide", "must not be empty"),
        ("json_schema", " \n", "guided_decoding_guide", "must not be empty"),
        (
            "regex",
            "a" * (MAX_GUIDE_BYTES + 1),
            "guided_decoding_guide",
            f"at most {MAX_GUIDE_BYTES} bytes, got {MAX_GUIDE_BYTES + 1}",
        ),
        ("regex", "a\ud800", "guided_decoding_guide", "lone surrogate at character 1"),
        ("regex", "(a", "guided_decoding_guide", "unclosed group"),
        ("regex", "a(?=b)", "guided_decoding_guide", "look-around"),
        ("regex", r"(a)\1", "guided_decoding_guide", "backreferences are not supported"),
        ("regex", r"(?-u:\xff)", "guided_decoding_guide", "invalid UTF-8"),
        ("regex", "[a&&b]", "guided_decoding_guide", "no text"),
        ("json_schema", "{", "guided_decoding_guide", "Expecting property name"),
        ("json_schema", "[]", "guided_decoding_guide", "must be an object"),
        ("json_schema", '{"type": "text"}', "guided_decoding_guide", "Invalid type: text"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "guided_decoding_guide", "uniqueItems"),
        ("json_schema", '{"$ref": "http://127.0.0.1/a"}', "guided_decoding_guide", "http://127.0.0.1/a"),
        (
            "json_schema",
            '{"type": "integer", "minimum": 5, "maximum": 2}',
            "guided_decoding_guide",
            "minimum (5) is greater",
        ),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "guided_decoding_guide", "x-guidance is not supported"),
        ("ebnf_grammar", 'start: "a', "guided_decoding_guide", "lexer error"),
        ("ebnf_grammar", "start: missing", "guided_decoding_guide", "missing"),
        ("ebnf_grammar", 'start: "a" </s>', "guided_decoding_guide", "</s>"),
        ("ebnf_grammar", 'start: <[9]> "a"', "guided_decoding_guide", "no text can follow"),
        ("ebnf_grammar", 'start: "a" start', "guided_decoding_guide", "Too many items"),
        ("ebnf_grammar", 'start: start "a"', "guided_decoding_guide", "no text can follow"),
        ("ebnf_grammar", 'root ::= "a', "guided_decoding_guide", "Unexpected end of input"),
        ("ebnf_grammar", 'rule ::= "a"', "guided_decoding_guide", "No 'root' rule"),
        ("ebnf_grammar", '{"grammars": [{"lark_grammar": "start: /a/"}]}', "guided_decoding_guide", "not a usable"),
        ("choice", "yes, no", "guided_decoding_guide", "Expecting value"),
        ("choice", "[]", "guided_decoding_guide", f"must have 1 to {MAX_CHOICES} choices, got 0"),
        ("choice", json.dumps(["x"] * 1025), "guided_decoding_guide", "got 1025"),
        ("choice", '["a", 1]', "guided_decoding_guide", "must be a JSON list of strings"),
        ("choice", r'["a", "\ud800"]', "guided_decoding_guide", "choice 1 is not Unicode"),
    ],
)
def test_refusals(demo: Served, kind: str, text: str, field: str, problem: str) -> None:
    with pytest.raises(RequestError, match=re.escape(problem)) as refusal:
        demo.compiler.compile(kind, text)
    assert refusal.value.field == field
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _chain(length: int, link: Callable[[int], object]) -> str:
    links = {f"a{index}": link(index + 1) for index in range(length)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}})


HOSTILE = {
    "chain of references": (
        "json_schema",
        _chain(6000, lambda index: {"$ref": f"#/$defs/a{index}"}),
        "too much stack or memory",
    ),
    "nested JSON": ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000, "is too deeply nested"),
    "large multiple": ("json_schema", '{"type": "integer", "multipleOf": 99999989}', "too complex"),
    "many patterns": (
        "json_schema",
        json.dumps({"patternProperties": {f"^a{index}b": {} for index in range(2000)}}),
        "takes more than 2 s to compile",
    ),
    "nested groups": ("regex", "(" * 20_000 + ")" * 20_000, "maximum number of nested parentheses"),
    "repeated classes": ("regex", r"(?i)\p{L}{3}" * 15_000, "too complex"),
    "chain of rules": (
        "ebnf_grammar",
        'start: s0\ns12000: "a"' + "".join(f"\ns{i}: s{i + 1} /x/" for i in range(12_000)),
        "too much",
    ),
    "doubling": (
        "ebnf_grammar",
        'start: S0\nS40: "a"' + "".join(f"\nS{i}: S{i + 1} S{i + 1}" for i in range(40)),
        "too big",
    ),
    "many symbols": ("ebnf_grammar", "start: " + '"a"? ' * 40_000, "grammar size"),
    "nested GBNF": ("ebnf_grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "is too deeply nested"),
}


@pytest.mark.parametrize(("kind", "text", "problem"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_guides_are_refused_and_the_next_one_compiles(demo: Served, kind: str, text: str, problem: str) -> None:
    before_s = _children_cpu_s()
    with pytest.raises(RequestError, match=problem) as refusal:
        demo.compiler.compile(kind, text)
    assert refusal.value.field == "guided_decoding_guide"
    assert _children_cpu_s() - before_s < 5 * guide_checker.MAX_CPU_S  # a process may have checked several guides
    matcher = demo.compiler.compile("regex", f"{kind}[0-9]").start()  # a new one each time, so not from the cache
    assert demo.text(list(matcher.forced_ids())).startswith(kind[:3])


def test_a_known_guide_is_not_tried_again(demo: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.compiler.compile("regex", "known[0-9]")

    def check(*_: object) -> str:
        raise guide_checker.GuideRefused("was tried")

    monkeypatch.setattr(guide_checker.GuideChecker, "check", check)
    assert demo.compiler.compile("regex", "known[0-9]").start().forced_ids()
    with pytest.raises(RequestError, match="was tried"):
        demo.compiler.compile("regex", "unknown[0-9]")
    for index in range(100):
        with pytest.raises(RequestError, match="was tried"):
            demo.compiler.compile("regex", f"refused {index}")
    assert demo.compiler.compile("regex", "known[0-9]").start().forced_ids()  # a refusal takes nobody's place


def test_the_guides_remembered_are_those_used_last(demo: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def check(_: object, kind: GuideKind, text: str) -> str:
        tried.append(text)
        return to_grammar(kind, text)

    monkeypatch.setattr(guide_checker.GuideChecker, "check", check)
    texts = [f"number {index}" for index in range(MAX_CACHED_GUIDES)]
    for text in [*texts, texts[0], "one more"]:
        demo.compiler.compile("regex", text)
    assert tried == [*texts, "one more"]
    tried.clear()
    for text in (texts[0], "one more", texts[2], texts[1]):
        demo.compiler.compile("regex", text)
    assert tried == [texts[1]]
