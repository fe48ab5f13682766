"""Damaged requests, guides, settings and environments: taken, or refused by an error of the project, soon."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.fuzz.cases import cases, check_damaged
from tests.fuzz.parser import Parser
from tests.fuzz.request_parsers import CHUNK, PLACES, request_parsers
from tests.fuzz.watch import refusal_of

CHEAP = ("messages", "tools", "ensemble", "mistral_nemo", "postprocessing")
GUIDES = ("guide json_schema", "guide regex", "guide choice", "guide ebnf_grammar")
OPERATORS = ("settings", "config.pbtxt", "container", "gateway settings")


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Parser]]:
    with request_parsers(tmp_path_factory.mktemp("requests")) as parsers:
        assert set(parsers) == {*CHEAP, *GUIDES, *OPERATORS}
        yield parsers


@pytest.mark.parametrize("name", CHEAP + GUIDES + OPERATORS)
def test_undamaged_inputs_are_taken(parsers: dict[str, Parser], name: str) -> None:
    for sample in parsers[name].samples:
        assert refusal_of(parsers[name].parse, sample) is None


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHEAP + GUIDES + OPERATORS)
def test_damaged_inputs_are_taken_or_refused(parsers: dict[str, Parser], name: str) -> None:
    check_damaged(name, parsers[name], cases(small=6, full=400) if name in GUIDES else cases(small=25, full=1500))


# What a client that calls postprocessing by hand may send in the place of the engine.
BY_HAND: list[tuple[dict[str, object], str]] = [
    ({"stream_chunk": [1, 2]}, "stream_chunk: 2 values do not begin with version 2 and a header"),
    (
        {"stream_chunk": [2, 5, 6, 0, 0, 1, 1, 1, 0, 1, 9, 1100, 4000]},
        "stream_chunk: text_ids must be 0 to 3999 but one is 4000",
    ),
    ({"stream_chunk": [2, 5, 6, 0, 0, 1, 0, 0, 0, 9, 9]}, "stream_chunk: text_ids hold 0 bytes, fewer than"),
    ({"stream_chunk": CHUNK, "top_log_probs": "[{"}, "top_log_probs: is no JSON of places: "),
    (
        {"stream_chunk": CHUNK, "prompt_log_probs": PLACES.replace("6", "4000")},
        "prompt_log_probs: ids must be in [0, 3999], got 4000",
    ),
    (
        {"stream_chunk": CHUNK, "top_log_probs": PLACES.replace("5", "-5")},
        "top_log_probs: ids must be in [0, 3999], got -5",
    ),
]


@pytest.mark.parametrize(("values", "problem"), BY_HAND)
def test_postprocessing_called_by_hand(parsers: dict[str, Parser], values: dict[str, object], problem: str) -> None:
    refused = refusal_of(parsers["postprocessing"].parse, json.dumps(values).encode())
    assert str(refused).startswith(problem)


def test_a_name_of_an_input_that_is_not_printable(parsers: dict[str, Parser]) -> None:
    refused = refusal_of(parsers["ensemble"].parse, json.dumps({"text_input": "a", "b\nc\u202e": 1}).encode())
    assert str(refused).startswith("b\\nc\\u202e: is not an input of this model (value 1)")
