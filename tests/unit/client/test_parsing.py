"""Server-sent events, addresses, tensors: all that needs no server."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from client import BrokenStream, Client, GenerationParams, Protocol, Response
from client.client import host_and_port
from client.load_report import LoadReport, percentile_ms
from client.meter import Meter
from client.params import InputTensor
from client.response import unpack
from client.sse import EventParser

EVENTS = {
    "plain": (b"data: one\n\ndata: two\n\n", ["one", "two"]),
    "CRLF": (b"data: one\r\n\r\ndata: two\r\n\r\n", ["one", "two"]),
    "CR": (b"data: one\r\rdata: two\r\r", ["one", "two"]),
    "mixed": (b"data: one\r\n\ndata: two\n\r\n", ["one", "two"]),
    "several lines": (b"data: one\ndata: two\n\n", ["one\ntwo"]),
    "several lines, CRLF": (b"data: one\r\ndata: two\r\n\r\n", ["one\ntwo"]),
    "no space": (b"data:one\ndata:  two\n\n", ["one\n two"]),
    "comments and other fields": (b": hello\nevent: x\nid: 1\nretry: 5\n\ndata: one\n: no\n\n", ["one"]),
    "empty data": (b"data\n\ndata:\n\n", ["", ""]),
    "byte order mark": (b"\xef\xbb\xbfdata: one\n\n", ["one"]),
    "characters of many bytes": ("data: é日👩‍👧\n\n".encode(), ["é日👩‍👧"]),
    "unfinished": (b"data: one\n\ndata: two\n", ["one"]),
}


@pytest.mark.parametrize("name", EVENTS)
def test_events_are_the_same_however_the_stream_is_cut(name: str) -> None:
    stream, expected = EVENTS[name]
    for first, second in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
        parser = EventParser()
        parts = (stream[:first], stream[first:second], stream[second:])
        assert [event for part in parts for event in parser.feed(part)] == expected, (first, second)
    parser = EventParser()
    assert [event for byte in stream for event in parser.feed(bytes([byte]))] == expected


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        (None, "grpc", "localhost:8001"),
        (None, "http", "localhost:8000"),
        ("example.org", "http", "example.org:8000"),
        ("example.org:1", "grpc", "example.org:1"),
        ("http://example.org:1/", "http", "example.org:1"),
        ("grpc://[::1]:9", "grpc", "[::1]:9"),
    ],
)
def test_addresses(url: str | None, protocol: Protocol, expected: str) -> None:
    assert host_and_port(url, protocol) == expected


@pytest.mark.parametrize("url", ["https://a", "http://a/v2", "a:b", "a:70000", "a?b=c", ":8001"])
def test_addresses_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: "):
        host_and_port(url, "http")


def test_protocol_of_another_name() -> None:
    with pytest.raises(ValueError, match="protocol: grpc or http"):
        Client(protocol="smtp")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "prompt_token_ids": [1]}, {"prompt_token_ids": []}])
def test_exactly_one_prompt(given: dict[str, object]) -> None:
    with Client(protocol="http") as client, pytest.raises(ValueError, match=r"^prompt"):
        client.generate(**given)  # type: ignore[arg-type]


def test_tools_want_messages() -> None:
    with Client(protocol="http") as client, pytest.raises(ValueError, match=r"^tools"):
        client.generate("a", tools=[])


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("max_tokens", 2**31, ValueError),
        ("max_tokens", "5", TypeError),
        ("max_tokens", 5.0, TypeError),
        ("max_tokens", True, TypeError),
        ("seed", -1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", 1e39, ValueError),
        ("temperature", 10**400, ValueError),
        ("temperature", False, TypeError),
        ("ignore_eos", 1, TypeError),
        ("stop_words", (1,), TypeError),
        ("stop_words", ("\ud800",), ValueError),
    ],
)
def test_what_a_tensor_cannot_hold_is_refused_by_name(field: str, value: object, kind: type[Exception]) -> None:
    params = dataclasses.replace(GenerationParams(), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(kind, match=f"^{field}: "):
        params.tensors()


def test_every_input_of_the_ensemble_can_be_sent() -> None:
    """But for second names, what TensorRT-LLM's requests must leave neutral, and what the client sends itself."""
    config = (Path(__file__).parents[3] / "model_repository/ensemble/config.pbtxt").read_text()
    declared = dict(re.findall(r'name: "(\w+)"\s+data_type: TYPE_(\w+)', config.partition("output [")[0]))
    own = {"text_input", "messages", "tools", "prompt_token_ids", "stream", "stop"}
    others = {"min_length", "random_seed", "pad_id", "beam_width", "length_penalty", "early_stopping"}
    others |= {name for name in declared if name.startswith("return_") and name != "return_log_probs"}
    tensors = {tensor.name: tensor for tensor in all_params().tensors()}
    assert set(declared) - own - others == set(tensors)
    for name, tensor in tensors.items():
        assert tensor.datatype == declared[name].replace("STRING", "BYTES"), name


def test_log_probabilities_are_read() -> None:
    place = {"log_prob": -0.5, "rank": 1, "top": []}
    outputs: dict[str, list[Any]] = {
        "output_log_probs": [-0.5, -1.0],
        "cum_log_probs": [-1.5],
        "top_log_probs": [json.dumps([place, place])],
        "prompt_log_probs": [json.dumps([None, place])],
    }
    response = Response.from_json({name: each if len(each) > 1 else each[0] for name, each in outputs.items()})
    assert (response.output_log_probs, response.cum_log_probs) == ((-0.5, -1.0), -1.5)
    assert (response.top_log_probs, response.prompt_log_probs) == ((place, place), (None, place))
    assert Response.from_outputs(outputs) == response
    with pytest.raises(BrokenStream, match="wrong type"):
        Response.from_outputs({"top_log_probs": ["no JSON"]})


def test_one_string_is_not_a_list_of_strings() -> None:
    with pytest.raises(TypeError, match=r"^stop_words: "):
        GenerationParams(stop_words="END")


def all_params() -> GenerationParams:
    """Every field set."""
    values: dict[str, object] = dict.fromkeys((field.name for field in dataclasses.fields(GenerationParams)), 1)
    values |= {"stop_words": ["a"], "bad_words": ["a"], "stop_token_ids": [1], "logit_bias": {1: 2.0}}
    values |= {"ignore_eos": True, "exclude_input_in_output": False, "cache_salt": "s", "return_log_probs": True}
    values |= {"embedding_bias": {"a": 1.0}, "guided_decoding_guide_type": "json", "guided_decoding_guide": ""}
    return GenerationParams(**values)  # type: ignore[arg-type]


def test_every_field_becomes_a_tensor() -> None:
    expected = {field.name for field in dataclasses.fields(GenerationParams)} - {"logit_bias", "embedding_bias"}
    expected |= {"logit_bias_ids", "logit_bias_values", "embedding_bias_words", "embedding_bias_weights"}
    assert sorted(tensor.name for tensor in all_params().tensors()) == sorted(expected)
    assert GenerationParams().tensors() == []


def test_raw_content_is_little_endian_and_strings_have_their_length() -> None:
    assert InputTensor("a", "INT32", (1, -1)).raw() == b"\x01\0\0\0\xff\xff\xff\xff"
    assert InputTensor("a", "BYTES", ("é", "")).raw() == b"\x02\0\0\0\xc3\xa9\0\0\0\0"
    assert InputTensor("a", "UINT64", (2**63,)).raw() == struct.pack("<Q", 2**63)


def test_content_is_unpacked_element_by_element() -> None:
    assert unpack("a", "INT32", b"\x01\0\0\0\xff\xff\xff\xff") == [1, -1]
    assert unpack("a", "BYTES", b"\x02\0\0\0\xc3\xa9\0\0\0\0\x01\0\0\0b") == ["é", "", "b"]


@pytest.mark.parametrize(
    ("datatype", "raw"), [("INT32", b"abc"), ("FP64", b"12345678"), ("BYTES", b"\x05\0\0\0ab"), ("BYTES", b"\1\0")]
)
def test_content_that_is_no_such_tensor(datatype: str, raw: bytes) -> None:
    with pytest.raises(BrokenStream, match=r"^a: "):
        unpack("a", datatype, raw)


def test_meter_counts_and_times() -> None:
    meter = Meter()
    for token_id in range(3):
        meter.add(Response("x", (token_id, token_id)))
    meter.add(Response("", (), 0, "stop", "END", 7, 6, 2))
    summary = meter.summary()
    assert summary.startswith("7 prompt tokens (2 cached), 6 output tokens, first token after 0.0")
    assert summary.endswith("finished: stop at 'END'")


def test_percentiles_are_nearest_rank() -> None:
    seconds = [value / 1000 for value in range(100, 0, -1)]
    assert [percentile_ms(seconds, percent) for percent in (0, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert percentile_ms([], 50) is None


def test_report_of_nothing_divides_by_nothing() -> None:
    report = LoadReport(num_streams=1, num_prompt_tokens=1)
    report.start()
    report.end()
    assert report.numbers()["tokens_per_response"] is None
    assert "first_token_p50_ms" in report.as_table()
