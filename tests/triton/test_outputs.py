"""What is sent is what is declared: names, datatypes, shapes, flags and counts of every response."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc import InferenceServerClient

from tests.triton.calls import Answer, Reply, ask, generate_stream, grpc_stream, post
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_until_idle

ALWAYS = {"text_output", "token_ids"}
AT_THE_END = {
    "finish_reason",
    "stop_reason",
    "num_input_tokens",
    "num_output_tokens",
    "num_cached_tokens",
    "kv_cache_reused_blocks",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
}
LOG_PROBS = {"cum_log_probs", "output_log_probs", "top_log_probs", "prompt_log_probs"}


def metadata(server: LiveServer, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Declared inputs and outputs, name -> (datatype, shape), in the server's own words."""
    with InferenceServerClient(server.grpc_url) as client:
        told = client.get_model_metadata(model, client_timeout=10)
    return tuple(
        {each.name: (each.datatype, tuple(each.shape)) for each in side} for side in (told.inputs, told.outputs)
    )  # type: ignore[return-value]


def fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a shape is one of a declared shape; the batch dimension is declared as -1 and is 1."""
    sizes = zip(shape[1:], declared[1:], strict=True)
    return shape[0] == 1 and all(wanted in (-1, size) for size, wanted in sizes)


@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("model", ["ensemble", "mistral_nemo"])
@pytest.mark.parametrize("stream", [True, False])
def test_every_tensor_is_as_declared(server: LiveServer, model: str, stream: bool, log_probs: bool) -> None:
    _, declared = metadata(server, model)
    prompts: dict[str, dict[str, Any]] = {
        "ensemble": {"text_input": "Hello", "stop_words": ["zzzz"]},
        "mistral_nemo": {"prompt_token_ids": [1, 1600, 1700]},
    }
    request = prompts[model] | {"max_tokens": 5, "num_return_sequences": 2, "temperature": 1.0, "seed": 1}
    if log_probs:
        request |= {"return_log_probs": True, "num_logprobs": 2, "prompt_logprobs": 1}
    answer = ask(server, model, stream=stream, **request)
    own = {"text_output", "token_ids"} if model == "ensemble" else {"stream_chunk", "token_ids"}
    each = own | {"sequence_index"} | (LOG_PROBS - {"prompt_log_probs"} if log_probs else set())
    for index in (0, 1):
        *others, last = answer.of(index)
        assert all(set(reply.tensors) == each for reply in others)
        of_the_prompt = {"prompt_log_probs"} if log_probs and index == 0 else set()
        assert set(last.tensors) == each | AT_THE_END | of_the_prompt
        assert bool(others) is stream
    for reply in answer.replies:
        assert_as_declared(reply, declared)
        if log_probs:
            assert reply.tensors["output_log_probs"].shape == (1, 1, len(reply.values("token_ids")))
    assert set(declared) == own | {"sequence_index"} | AT_THE_END | LOG_PROBS


def test_every_tensor_of_the_stateless_models_is_as_declared(server: LiveServer) -> None:
    calls: list[tuple[str, dict[str, Any], set[str]]] = [
        ("preprocessing", {"text_input": "Hello"}, {"prompt_token_ids"}),
        (
            "preprocessing",
            {"text_input": "Hello", "bad_words": ["a", "the"], "logit_bias_ids": [1500], "logit_bias_values": [1.0]},
            {"prompt_token_ids", "bad_word_ids", "bad_word_lengths", "logit_bias_ids", "logit_bias_values"},
        ),
        ("postprocessing", {"token_ids": [1600, 1700]}, {"text_output"}),
    ]
    for model, request, names in calls:
        _, declared = metadata(server, model)
        (reply,) = ask(server, model, **request).replies
        assert set(reply.tensors) == names
        assert_as_declared(reply, declared)


def assert_as_declared(reply: Reply, declared: dict[str, Any]) -> None:
    for name, sent in reply.tensors.items():
        datatype, shape = declared[name]
        assert sent.datatype == datatype, name
        assert fits(sent.shape, shape), (name, sent.shape, shape)


def test_one_sequence_has_no_index(server: LiveServer) -> None:
    answer = ask(server, text_input="Hello", max_tokens=3, stream=True)
    *others, last = answer.replies
    assert all(set(reply.tensors) == ALWAYS for reply in others)
    assert set(last.tensors) == ALWAYS | AT_THE_END


def test_declared_inputs_are_those_of_the_configuration(server: LiveServer) -> None:
    inputs, _ = metadata(server, "ensemble")
    engine, _ = metadata(server, "mistral_nemo")
    preprocessing, _ = metadata(server, "preprocessing")
    assert {name: inputs[name] for name in inputs if name in engine} == {
        name: engine[name] for name in inputs if name in engine
    }
    assert set(inputs) == set(preprocessing) | (set(engine) - {"abort_handle", "bad_word_ids", "bad_word_lengths"})


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_last_response_carries_the_final_flag_and_nothing_follows(
    server: LiveServer, num_sequences: int, stream: bool
) -> None:
    with grpc_stream(server) as calls:
        calls.send(text_input="Hello", max_tokens=6, stream=stream, num_return_sequences=num_sequences)
        replies = list(calls.until_final())
        assert calls.is_silent(0.5)
    assert replies[-1].tensors
    assert replies[-1].value("finish_reason") == "length"
    assert sum(bool(reply.values("finish_reason")) for reply in replies) == num_sequences


def test_counts_and_times(server: LiveServer) -> None:
    answer = ask(server, prompt_token_ids=[1] * 100, max_tokens=9, stream=True)
    last = answer.replies[-1]
    assert len(answer.ids()) == 9
    counts = ["num_input_tokens", "num_output_tokens", "num_cached_tokens", "kv_cache_reused_blocks"]
    assert [last.value(name) for name in counts] == [100, 9, 0, 0]
    times = ["arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"]
    moments = [last.value(name) for name in times]
    assert moments == sorted(moments)
    assert moments[0] > 0
    assert moments[-1] - moments[0] < 60e9


@pytest.mark.parametrize(
    "outputs", [["text_output"], ["token_ids"], ["finish_reason"], ["text_output", "sequence_index"]]
)
def test_only_requested_outputs_are_sent(server: LiveServer, outputs: list[str]) -> None:
    expected = ask(server, text_input="Hello", max_tokens=6)
    with grpc_stream(server) as calls:
        calls.send(text_input="Hello", max_tokens=6, stream=True, outputs=outputs)
        answer = Answer(tuple(calls.until_final()))
    assert {name for reply in answer.replies for name in reply.tensors} <= set(outputs)
    assert "text_output" not in outputs or answer.text() == expected.text()
    assert "token_ids" not in outputs or answer.ids() == expected.ids()
    assert "finish_reason" not in outputs or answer.finish_reason() == "length"


def test_samples_of_one_prompt(server: LiveServer) -> None:
    request: dict[str, Any] = {"text_input": "Once", "max_tokens": 12, "temperature": 1.0, "seed": 11}
    single = ask(server, **request)
    several = ask(server, **request, num_return_sequences=4, stream=True)
    assert several.summary(4)[0] == single.summary()[0]
    assert len({tuple(several.ids(index)) for index in range(4)}) == 4
    assert ask(server, **request, num_return_sequences=4).summary(4) == several.summary(4)
    assert generate_stream(server, **request, num_return_sequences=4).summary(4) == several.summary(4)
    assert {index for reply in several.replies for index in reply.values("sequence_index")} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "request_inputs", [{"num_return_sequences": 2, "max_tokens": 400}, {"stream": True, "max_tokens": 400}]
)
def test_generate_refuses_what_has_several_responses(server: LiveServer, request_inputs: dict[str, Any]) -> None:
    _, content = post(server, "ensemble/generate", {"text_input": "Hello"} | request_inputs)
    assert b'"error":' in content
    assert b"use generate stream" in content
    wait_until_idle(server)


def test_token_level_client_of_the_engine(server: LiveServer) -> None:
    request: dict[str, Any] = {"prompt_token_ids": [1, 1500, 2600], "max_tokens": 10, "temperature": 0.9, "seed": 3}
    expected = ask(server, **request)
    with grpc_stream(server) as calls:
        calls.send("mistral_nemo", "mine", outputs=["token_ids", "finish_reason"], **request, stream=True)
        answer = Answer(tuple(calls.until_final()))
    assert answer.ids() == expected.ids()
    assert answer.finish_reason() == "length"
    assert {reply.request_id for reply in answer.replies} == {"mine"}
    assert {name for reply in answer.replies for name in reply.tensors} == {"token_ids", "finish_reason"}


def test_bounded_responses(start_server: StartServer) -> None:
    """With `max_tokens_per_response` no response has more, however fast the tokens come, and streams take turns."""
    own = start_server(runner="fake", max_tokens_per_response="2")
    with grpc_stream(own) as calls:
        for request_id in ("a", "b"):
            calls.send(request_id=request_id, prompt_token_ids=[1], max_tokens=3001, stream=True, seed=7)
        replies: list[Reply] = []
        while sum(reply.is_final for reply in replies) < 2:
            replies.append(calls.next())
    for request_id in ("a", "b"):
        answer = Answer(tuple(reply for reply in replies if reply.request_id == request_id))
        sizes = [len(reply.values("token_ids")) for reply in answer.replies]
        assert max(sizes) == 2
        assert sum(sizes) == 3001
        assert answer.summary() == ask(own, prompt_token_ids=[1], max_tokens=3001, seed=7).summary()
    last_of = {
        request_id: max(i for i, reply in enumerate(replies) if reply.request_id == request_id) for request_id in "ab"
    }
    assert abs(last_of["a"] - last_of["b"]) < 1000, "one stream had to wait for the end of the other"
    own.stop()
