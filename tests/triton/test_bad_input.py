"""Everything that must be refused: by name, with its bound and the value, at once, alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import ask, declared_inputs, generate, grpc_stream, post, tensor
from tests.triton.live_server import LiveServer
from tests.triton.metrics import read_metrics, wait_for_metric

TEXT = {"text_input": "Hello"}
IDS = {"prompt_token_ids": [1, 1500]}
SERVED = " in the served max_model_len 4096"
ONE_PROMPT = "exactly one of text_input, messages, prompt_token_ids must be given, got"

# Request -> the server's words behind the name of the field; by gRPC and by HTTP alike.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (TEXT | {"max_tokens": 0}, "max_tokens: must be at least 1 (0 needs prompt_logprobs), got 0"),
    (TEXT | {"max_tokens": -5}, "max_tokens: must be at least 1 (0 needs prompt_logprobs), got -5"),
    (IDS | {"max_tokens": 4095}, f"max_tokens: at most 4094 fit behind a prompt of 2 tokens{SERVED}, got 4095"),
    (IDS | {"max_tokens": 2**31 - 1}, f"max_tokens: at most 4094 fit behind a prompt of 2 tokens{SERVED}, got {2**31 - 1}"),
    ({"prompt_token_ids": [5] * 4096}, "prompt_token_ids: the prompt has 4096 tokens, at most 4095 fit with 1 more"),
    ({"text_input": "~ " * 5000}, "prompt_token_ids: the prompt has 10001 tokens, at most 4095 fit with 1 more"),
    (TEXT | {"max_tokens": 4, "min_tokens": 5}, r"min_tokens: must be in [0, max_tokens = 4], got 5"),
    (TEXT | {"min_tokens": -1}, "min_tokens: must be in [0, max_tokens = 256], got -1"),
    (TEXT | {"min_length": -1}, "min_tokens: must be in [0, max_tokens = 256], got -1"),
    (TEXT | {"min_tokens": 2, "min_length": 3}, "min_length: is another name of min_tokens; got 3 here and 2 there"),
    (TEXT | {"seed": 2, "random_seed": 3}, "random_seed: is another name of seed; got 3 here and 2 there"),
    (TEXT | {"temperature": -0.5}, "temperature: must be in [0.0, 100.0], got -0.5"),
    (TEXT | {"temperature": 100.5}, "temperature: must be in [0.0, 100.0], got 100.5"),
    (TEXT | {"temperature": 0.0078125}, "temperature: must be 0 (greedy) or at least 0.01, got 0.0078125"),
    (TEXT | {"temperature": float("nan")}, "temperature: must be in [0.0, 100.0], got nan"),
    (TEXT | {"temperature": float("inf")}, "temperature: must be in [0.0, 100.0], got inf"),
    (TEXT | {"top_k": -1}, "top_k: must be in [0, 2147483647], got -1"),
    (TEXT | {"top_p": 0.0}, "top_p: must be in (0, 1], got 0.0"),
    (TEXT | {"top_p": 1.5}, "top_p: must be in (0, 1], got 1.5"),
    (TEXT | {"top_p": float("nan")}, "top_p: must be in (0, 1], got nan"),
    (TEXT | {"min_p": -0.5}, "min_p: must be in [0.0, 1.0], got -0.5"),
    (TEXT | {"min_p": 1.5}, "min_p: must be in [0.0, 1.0], got 1.5"),
    (TEXT | {"repetition_penalty": 0.0}, "repetition_penalty: must be in (0, 100], got 0.0"),
    (TEXT | {"repetition_penalty": -1.0}, "repetition_penalty: must be in (0, 100], got -1.0"),
    (TEXT | {"presence_penalty": 101.0}, "presence_penalty: must be in [-100.0, 100.0], got 101.0"),
    (TEXT | {"frequency_penalty": -101.0}, "frequency_penalty: must be in [-100.0, 100.0], got -101.0"),
    (TEXT | {"num_return_sequences": 0}, "num_return_sequences: must be in [1, 128], got 0"),
    (TEXT | {"num_return_sequences": 129}, "num_return_sequences: must be in [1, 128], got 129"),
    (TEXT | {"deadline_ms": 0}, "deadline_ms: must be at least 1, got 0"),
    (TEXT | {"deadline_ms": -1}, "deadline_ms: must be at least 1, got -1"),
    (TEXT | {"stop_words": ["a" * 1025]}, "stop_words: each must have 1 to 1024 bytes, got 1025"),
    (TEXT | {"stop_words": ["a"] * 65}, "stop_words: at most 64 strings, got 65"),
    (TEXT | {"stop_token_ids": [4096]}, "stop_token_ids: ids must be in [0, 4095], got 4096 at index 0"),
    (TEXT | {"stop_token_ids": [1500] * 257}, "stop_token_ids: at most 256 ids, got 257"),
    (TEXT | {"end_id": -1}, "end_id: ids must be in [0, 4095], got -1 at index 0"),
    ({"prompt_token_ids": [1, 4096]}, "prompt_token_ids: ids must be in [0, 4095], got 4096 at index 1"),
    ({"prompt_token_ids": [1, 2, -1]}, "prompt_token_ids: ids must be in [0, 4095], got -1 at index 2"),
    ({"pad_id": 4}, f"text_input: {ONE_PROMPT} none"),
    (TEXT | IDS, f"prompt_token_ids: {ONE_PROMPT} text_input and prompt_token_ids"),
    (TEXT | {"messages": "[]"} | IDS, f"messages: {ONE_PROMPT} text_input and messages and prompt_token_ids"),
    (TEXT | {"tools": "[]"}, "tools: need messages, got them with text_input"),
    ({"messages": "{"}, "messages: is not valid JSON"),
    ({"messages": "{}"}, "messages: "),
    ({"messages": "[]"}, "messages: Conversation must have at least one message"),
    ({"messages": '[{"role": "judge", "content": "x"}]'}, "messages: "),
    ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages: "),
    ({"messages": '[{"role": "user", "content": "x"}]', "tools": "[1]"}, "tools: "),
    # What the schema has and this version does not do: any value but the neutral one.
    (TEXT | {"beam_width": 2}, "beam_width: is not supported: must be 1, got 2"),
    (TEXT | {"length_penalty": 2.0}, "length_penalty: is not supported: must be 0.0 or 1.0, got 2.0"),
    (TEXT | {"early_stopping": True}, "early_stopping: is not supported: must be false, got true"),
    (TEXT | {"return_context_logits": True}, "return_context_logits: is not supported: must be false, got true"),
    (TEXT | {"return_generation_logits": True}, "return_generation_logits: is not supported: must be false, got true"),
    (TEXT | {"num_logprobs": 21}, "num_logprobs: must be in [0, 20], got 21"),
    (TEXT | {"prompt_logprobs": -1}, "prompt_logprobs: must be in [0, 20], got -1"),
    (TEXT | {"guided_decoding_guide_type": "xml"}, "guided_decoding_guide_type: "),
    (TEXT | {"guided_decoding_guide": "{}"}, "guided_decoding_guide_type: must be given with guided_decoding_guide"),
    (
        TEXT | {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": '{"type": "nothing"}'},
        "guided_decoding_guide: not a usable json_schema",
    ),
    (
        TEXT | {"guided_decoding_guide_type": "json", "ignore_eos": True},
        "ignore_eos: cannot be combined with guided decoding",
    ),
    (TEXT | {"embedding_bias_weights": [0.5]}, "embedding_bias_weights: must be as many as embedding_bias_words = 0, got 1"),
    (TEXT | {"logit_bias_ids": [1500]}, "logit_bias_values: must be as many as logit_bias_ids = 1, got 0"),
    (
        TEXT | {"logit_bias_ids": [1500], "logit_bias_values": [101.0]},
        "logit_bias_values: must be in [-100.0, 100.0], got 101.0",
    ),
    (TEXT | {"priority": 1001}, "priority: must be in [-1000, 1000], got 1001"),
    (TEXT | {"cache_salt": "x" * 257}, "cache_salt: at most 256 characters, got 257"),
]  # fmt: skip

# Those of them that a token-level client may send to `mistral_nemo` itself.
REFUSED_BY_THE_ENGINE = [
    (request_inputs, problem)
    for request_inputs, problem in REFUSED
    if set(request_inputs) - {"text_input"}
    and set(request_inputs) - {"text_input"} <= set(declared_inputs("mistral_nemo"))
    if ONE_PROMPT not in problem
]

# The neutral values of the same inputs, all in one request.
NEUTRAL: dict[str, Any] = {
    "beam_width": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_log_probs": False,
    "num_logprobs": 0,
    "guided_decoding_guide_type": "",
    "guided_decoding_guide": "",
    "bad_words": [""],
    "embedding_bias_words": [""],
    "embedding_bias_weights": [0.0],
    "priority": 0,
    "cache_salt": "",
    "pad_id": 0,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "return_perf_metrics": True,
    "stop_words": [""],
    "stop": False,
    "min_tokens": 0,
    "min_length": 0,
    "min_p": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "num_return_sequences": 1,
    "seed": 5,
    "random_seed": 5,
    "exclude_input_in_output": True,
}

# What Triton itself refuses, in its own words; the JSON of HTTP with status 500, since it does not call it the client's mistake.
REFUSED_BY_TRITON: list[tuple[bytes | dict[str, Any], int, str]] = [
    (TEXT | {"max_tokens": "5"}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
    (TEXT | {"max_tokens": 5.5}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
    (TEXT | {"max_tokens": None}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
    (TEXT | {"max_tokens": True}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
    (TEXT | {"temperature": "warm"}, 500, "attempt to access JSON non-number as double"),
    (TEXT | {"seed": -1}, 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
    (TEXT | {"stream": 1}, 500, "attempt to access JSON non-boolean as boolean"),
    (TEXT | {"stop_words": 5}, 500, "attempt to access JSON non-string as string"),
    ({"text_input": 5}, 500, "attempt to access JSON non-string as string"),
    ({"text_input": None}, 500, "attempt to access JSON non-string as string"),
    ({"text_input": {"a": 1}}, 500, "attempt to access JSON non-string as string"),
    ({"text_input": "\ud800"}, 500, "The surrogate pair in string is invalid"),
    ({"prompt_token_ids": [1.5]}, 500, "attempt to access JSON non-signed-integer as signed-integer"),
    (b"{", 500, "failed to parse the request JSON buffer"),
    (b"[]", 500, "attempt to get members for non-object"),
    ({"text_input": ["a", "b"]}, 400, "batch-size must be <= 1"),
    (TEXT | {"max_tokens": [1, 2]}, 400, "batch size does not match"),
    (TEXT | {"max_tokens": []}, 400, "input byte size mismatch"),
    ({}, 400, "request has 0 inputs"),
    ({"prompt": "Hello"}, 400, "request has 0 inputs"),
    ({"max_tokens": 4}, 400, "request has 0 inputs"),  # none of them for the first step
]


def names(table: list[tuple[Any, ...]]) -> list[str]:
    return [row[-1][:40] for row in table]


@pytest.mark.parametrize(("request_inputs", "problem"), REFUSED, ids=names(REFUSED))
def test_refused_over_grpc(server: LiveServer, request_inputs: dict[str, Any], problem: str) -> None:
    with grpc_stream(server) as stream:
        stream.send(**request_inputs)
        with pytest.raises(InferenceServerException) as refused:
            stream.next(timeout_s=60)
        assert stream.is_silent(0.02)
    assert refused.value.message().startswith(f"in ensemble 'ensemble', {problem}")


@pytest.mark.parametrize(("request_inputs", "problem"), REFUSED, ids=names(REFUSED))
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_refused_over_http(server: LiveServer, path: str, request_inputs: dict[str, Any], problem: str) -> None:
    status, content = post(server, f"ensemble/{path}", request_inputs, timeout_s=60)
    assert status == 400, content
    assert json.loads(content.removeprefix(b"data: "))["error"].startswith(f"in ensemble 'ensemble', {problem}")


@pytest.mark.parametrize(("request_inputs", "problem"), REFUSED_BY_THE_ENGINE, ids=names(REFUSED_BY_THE_ENGINE))
def test_refused_by_the_engine_called_directly(
    server: LiveServer, request_inputs: dict[str, Any], problem: str
) -> None:
    inputs = {name: value for name, value in request_inputs.items() if name != "text_input"}
    with pytest.raises(InferenceServerException) as refused:
        ask(server, "mistral_nemo", **({"prompt_token_ids": [1, 1500]} | inputs))
    assert refused.value.message().startswith(problem)


@pytest.mark.parametrize(("body", "status", "problem"), REFUSED_BY_TRITON, ids=names(REFUSED_BY_TRITON))
def test_refused_by_triton_over_http(server: LiveServer, body: Any, status: int, problem: str) -> None:
    answered, content = post(server, "ensemble/generate", body, timeout_s=60)
    assert answered == status
    assert problem in json.loads(content)["error"]


def test_neutral_values_change_nothing(server: LiveServer) -> None:
    plain = ask(server, text_input="Hello", max_tokens=12).summary()
    assert ask(server, text_input="Hello", max_tokens=12, **NEUTRAL).summary() == plain
    assert [generate(server, text_input="Hello", max_tokens=12, **NEUTRAL).value("text_output")] == [plain[0][0]]


@pytest.mark.parametrize(
    ("name", "datatype", "values", "shape", "problem"),
    [
        ("max_tokens", "INT64", [5], (1, 1), "data-type"),
        ("max_tokens", "FP32", [5.0], (1, 1), "data-type"),
        ("temperature", "FP64", [0.5], (1, 1), "data-type"),
        ("text_input", "INT32", [5], (1, 1), "data-type"),
        ("max_tokens", "INT32", [5], (1,), "shape"),
        ("max_tokens", "INT32", [5, 6], (1, 2), "shape"),
        ("max_tokens", "INT32", [5, 6], (2, 1), "batch size does not match"),
        ("stop_words", "BYTES", ["a", "b"], (1, 1, 2), "shape"),
        ("max_token", "INT32", [5], (1, 1), "unexpected inference input 'max_token'"),
    ],
)  # fmt: skip
def test_tensors_of_another_kind_are_refused(
    server: LiveServer, name: str, datatype: str, values: list[Any], shape: tuple[int, ...], problem: str
) -> None:
    prompt = [] if name == "text_input" else [tensor("text_input", "BYTES", "Hello")]
    with grpc_stream(server) as stream:
        stream.send(inputs=[*prompt, tensor(name, datatype, values, shape)])
        with pytest.raises(InferenceServerException, match=problem) as refused:
            stream.next(timeout_s=60)
    assert name in refused.value.message() or problem.startswith("batch size")


@pytest.mark.parametrize("name", ["text_input", "messages", "stop_words"])
def test_bytes_that_are_not_utf8_are_refused(server: LiveServer, name: str) -> None:
    prompt = [tensor("text_input", "BYTES", "Hello")] if name == "stop_words" else []
    with grpc_stream(server) as stream:
        stream.send(inputs=[*prompt, tensor(name, "BYTES", b"ab\xff")])
        with pytest.raises(
            InferenceServerException, match=f"{name}: string 0 is not UTF-8: invalid start byte at byte 2"
        ):
            stream.next(timeout_s=60)


@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (b'"id": "ab\xff"', "id: is not UTF-8: invalid start byte at byte 2"),
        (b'"a\xffb": 1', "parameters: cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b'"b": "\xff"', "parameters: cannot be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_names_and_ids_that_are_not_utf8_are_refused(server: LiveServer, model: str, more: bytes, problem: str) -> None:
    prompt = b'"text_input": "Hello"' if model == "ensemble" else b'"prompt_token_ids": [1, 1500]'
    status, content = post(server, f"{model}/generate", b"{%b, %b}" % (prompt, more), timeout_s=60)
    assert status == 400, content
    assert problem in json.loads(content)["error"]


@pytest.mark.parametrize("key", ["max_token", "sequence_id", "model", "abort_handle", "timeout"])
def test_unknown_keys_are_refused(server: LiveServer, key: str) -> None:
    problem = f"in ensemble 'ensemble', {key}: is not an input of this model (value 5); inputs are: bad_words, "
    status, content = post(server, "ensemble/generate", TEXT | {key: 5})
    assert status == 400
    message = json.loads(content)["error"]
    assert message.startswith(problem)
    assert all(name in message for name in ("max_tokens", "text_input", "temperature", "stop_words"))
    if key in ("sequence_id", "timeout"):
        return  # gRPC clients cannot send these as parameters: tritonclient keeps them for Triton
    with grpc_stream(server) as stream:
        stream.send(**TEXT, parameters={key: 5})
        with pytest.raises(InferenceServerException) as refused:
            stream.next(timeout_s=60)
    assert refused.value.message().startswith(problem)


def test_abort_handle_of_nothing_does_nothing(server: LiveServer) -> None:
    with grpc_stream(server) as stream:
        stream.send("mistral_nemo", abort_handle=12345)
        (reply,) = stream.until_final()
    assert not reply.tensors


def test_refusals_are_counted(idle_server: LiveServer) -> None:
    before = read_metrics(idle_server)["request_failure_total"]
    assert post(idle_server, "ensemble/generate", TEXT | {"max_tokens": 0})[0] == 400
    wait_for_metric(idle_server, "request_failure_total", before + 1)
