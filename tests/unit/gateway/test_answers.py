"""What the gateway makes of a request and of an answer, against a Triton that follows a script.

The demo checkpoint writes no tool calls by itself, so what a model that does would send is scripted here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
import pytest

from client.gateway.tool_calls import TOOL_CALLS_ID
from tests.unit.client.fake_triton import Drop, EarlyEnd, Failure, FakeTriton, Pause, Received, Reply, Step
from tests.unit.gateway.conftest import PROMPT_IDS, last
from tests.unit.gateway.running_gateway import RunningGateway, events_of

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def values(received: Received) -> dict[str, Any]:
    """Every tensor's datatype and values."""
    return {name: (datatype, found) for name, (datatype, _, found) in received.inputs.items()}


def test_a_whole_answer(gateway: RunningGateway) -> None:
    answer = gateway.chat().json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello"}
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == (
        0,
        "stop",
        None,
        None,
    )
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "mistral-nemo"
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_streamed_answer(gateway: RunningGateway) -> None:
    chunks = events_of(gateway.chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 9
    assert len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in events_of(gateway.chat(stream=True)))


def test_every_field_becomes_its_tensor(gateway: RunningGateway, fake: FakeTriton) -> None:
    body: dict[str, Any] = {
        "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.25, "n": 2, "seed": -1, "stop": "a", "min_p": 0.125,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.5, "top_k": -1, "min_tokens": 2,
        "ignore_eos": True, "stop_token_ids": [4], "bad_words": ["b"], "priority": -3, "cache_salt": "s",
        "logit_bias": {"9": -1.5}, "logprobs": True, "guided_choice": ["x", "é"],
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "modalities": ["text"],
    }  # fmt: skip
    fake.script = lambda _: [last("", [], sequence_index=[0]), last("", [], sequence_index=[1])]
    gateway.chat("é", **body)
    (received,) = fake.received
    assert received.model == "ensemble"
    assert json.loads(values(received).pop("messages")[1][0]) == [{"role": "user", "content": "é"}]
    assert {name: value for name, value in values(received).items() if name != "messages"} == {
        "max_tokens": ("INT32", [5]), "temperature": ("FP32", [0.5]), "top_p": ("FP32", [0.25]),
        "num_return_sequences": ("INT32", [2]), "seed": ("UINT64", [2**64 - 1]), "stop_words": ("BYTES", ["a"]),
        "min_p": ("FP32", [0.125]), "frequency_penalty": ("FP32", [0.5]), "presence_penalty": ("FP32", [-0.5]),
        "repetition_penalty": ("FP32", [1.5]), "top_k": ("INT32", [0]), "min_tokens": ("INT32", [2]),
        "ignore_eos": ("BOOL", [True]), "stop_token_ids": ("INT32", [4]), "bad_words": ("BYTES", ["b"]),
        "priority": ("INT32", [-3]), "cache_salt": ("BYTES", ["s"]), "logit_bias_ids": ("INT32", [9]),
        "logit_bias_values": ("FP32", [-1.5]), "num_logprobs": ("INT32", [1]), "stream": ("BOOL", [False]),
        "guided_decoding_guide_type": ("BYTES", ["choice"]), "guided_decoding_guide": ("BYTES", ['["x","é"]']),
    }  # fmt: skip
    assert received.parameters["triton_enable_empty_final_response"] is True


def test_defaults_are_openais(gateway: RunningGateway, fake: FakeTriton) -> None:
    gateway.chat()
    gateway.post("/v1/completions", prompt="x")
    chat, completion = map(values, fake.received)
    assert chat.keys() == {"messages", "temperature", "stream"}
    assert chat["temperature"] == ("FP32", [1.0])
    assert completion["max_tokens"] == ("INT32", [16])
    assert completion["text_input"] == ("BYTES", ["x"])


@pytest.mark.parametrize(
    ("body", "kind", "guide"),
    [
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": {"type": "json_object"}}, "json", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            "json_schema",
            '{"type":"null"}',
        ),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type":"null"}'),
        ({"guided_json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_grammar": 'start: "a"'}, "ebnf_grammar", 'start: "a"'),
        ({"nvext": {"guided_regex": "a+"}}, "regex", "a+"),
    ],
)
def test_guides(gateway: RunningGateway, fake: FakeTriton, body: dict[str, Any], kind: str, guide: str) -> None:
    for path, prompt in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ):
        assert gateway.post(path, **prompt, **body).status_code == 200
        sent = values(fake.received[-1])
        assert sent.get("guided_decoding_guide_type", ("BYTES", [None]))[1] == [kind]
        assert sent.get("guided_decoding_guide", ("BYTES", [None]))[1] == [guide]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"nope": 1}, "nope"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"999999999": 1, "5": 1e300}}, "logit_bias"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["\ud800"]}, "stop"),
    ({"stop_token_ids": [2**31]}, "stop_token_ids"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"tools": []}, "tools"),
    ({"tools": TOOLS * 2}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools[0].function.strict"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "n"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"top_k": 3, "nvext": {"top_k": 3}}, "nvext.top_k"),
    ({"store": True}, "store"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"functions": []}, "functions"),
    ({"model": None}, "model"),
    ({"messages": ["hi"]}, "messages[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD, ids=[f"{param}-{index}" for index, (_, param) in enumerate(BAD)])
def test_what_cannot_be_meant_is_refused_by_name(
    gateway: RunningGateway, fake: FakeTriton, body: dict[str, Any], param: str
) -> None:
    content = {"model": "mistral-nemo", "messages": [{"role": "user", "content": "Hi"}]} | body
    with gateway.client() as client:
        response = client.post(
            "/v1/chat/completions", content=json.dumps(content), headers={"content-type": "application/json"}
        )
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert fake.received == [], "nothing was asked of the server"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({}, "prompt"),
    ],
)
def test_completions_that_cannot_be_meant(gateway: RunningGateway, body: dict[str, Any], param: str) -> None:
    response = gateway.post("/v1/completions", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    ("failure", "status", "param", "code"),
    [
        (Failure("in ensemble 'ensemble', temperature: must be 0"), 400, "temperature", None),
        (Failure("stop_words: at most 64 strings"), 400, "stop", None),
        (Failure("prompt_token_ids: the prompt is long, max_model_len 4"), 400, "messages", "context_length_exceeded"),
        (Failure("in ensemble 'ensemble', the queue is full: 3 requests wait"), 429, None, "queue_full"),
        (Failure("deadline_ms: nothing was generated within 5 ms"), 503, None, "deadline_exceeded"),
        (Failure("deadline_ms: must be at least 1"), 400, "deadline_ms", None),
        (Failure("the engine died; it is being restarted, try again soon"), 503, None, "not_ready"),
        (Failure("in ensemble 'ensemble', cancelled"), 503, None, "cancelled"),
        (Failure("Request for unknown model: 'ensemble' is not found"), 503, None, "not_ready"),
        (Failure("internal error: KeyError: bug"), 500, None, None),
        (Failure("Socket closed", grpc.StatusCode.UNAVAILABLE), 503, None, "not_ready"),
        (Failure("of that kind", grpc.StatusCode.UNIMPLEMENTED), 500, None, None),
        (Drop(), 503, None, "not_ready"),
        (EarlyEnd(), 503, None, "not_ready"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_server(
    gateway: RunningGateway, fake: FakeTriton, failure: Step, status: int, param: str, code: str, stream: bool
) -> None:
    fake.script = lambda _: [failure]
    response = gateway.chat(stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error
    assert ("retry-after" in response.headers) is (status in (429, 503))
    assert "ensemble '" not in error["message"].partition("unknown model")[0]


def test_an_error_in_the_middle_of_a_stream_is_an_event(gateway: RunningGateway, fake: FakeTriton) -> None:
    reply = Reply({"text_output": ["Hel"], "token_ids": [11]})
    fake.script = lambda _: [reply, Failure("the engine died")]
    *_, error = events_of(gateway.chat(stream=True))
    assert error["error"]["type"] == "server_error"
    fake.script = lambda _: [reply, last("", [], "cancelled")]
    *_, error = events_of(gateway.chat(stream=True))
    assert "cancelled" in error["error"]["message"]
    assert gateway.chat().status_code == 503


CALL = '[{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]'


def tool_script(_: Received) -> Iterator[Step]:
    """Some text, the control token (which ends its response), and two calls in pieces."""
    yield Reply({"text_output": ["[Let me see] "], "token_ids": [50, TOOL_CALLS_ID]})
    for start in range(0, len(CALL), 7):
        yield Reply({"text_output": [CALL[start : start + 7]], "token_ids": [60]})
    yield last("", [2])


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_recognised_by_the_control_token(gateway: RunningGateway, fake: FakeTriton, stream: bool) -> None:
    fake.script = tool_script
    response = gateway.chat(tools=TOOLS, stream=stream)
    assert values(fake.received[0])["stream"] == ("BOOL", [True]), "only a stream keeps the token's place"
    assert json.loads(values(fake.received[0])["tools"][1][0]) == TOOLS
    calls: list[dict[str, Any]] = []
    if stream:
        chunks = events_of(response)
        content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        for delta in (found for chunk in chunks for found in chunk["choices"][0]["delta"].get("tool_calls", ())):
            if "id" in delta:
                assert delta["index"] == len(calls)
                calls.append(delta)
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        content, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert content == "[Let me see] "
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("f", '{"a": "]"}'),
        ("g", "{}"),
    ]
    assert all(len(call["id"]) == 9 and call["id"].isalnum() and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == 2
    assert reason == "tool_calls"


def test_text_that_looks_like_calls_stays_text(gateway: RunningGateway, fake: FakeTriton) -> None:
    fake.script = lambda _: [Reply({"text_output": [CALL], "token_ids": [50]}), last("", [2])]
    (choice,) = gateway.chat(tools=TOOLS).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    assert choice["finish_reason"] == "stop"


def test_calls_that_are_cut_off_say_so(gateway: RunningGateway, fake: FakeTriton) -> None:
    part = '[{"name": "f", "arguments": {"a": "'
    fake.script = lambda _: [
        Reply({"text_output": [""], "token_ids": [TOOL_CALLS_ID]}),
        last(part, [60], "length"),
    ]
    (choice,) = gateway.chat(tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "'


def test_one_call_at_most_without_parallel_calls(gateway: RunningGateway, fake: FakeTriton) -> None:
    fake.script = tool_script
    (choice,) = gateway.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f"]


def test_forced_calls_begin_behind_the_control_token(gateway: RunningGateway, fake: FakeTriton) -> None:
    def script(received: Received) -> list[Step]:
        if received.model == "preprocessing":
            return [Reply({"prompt_token_ids": PROMPT_IDS}, final=True)]
        return [last(CALL, [60, 2])]

    fake.script = script
    strict = [{"type": "function", "function": {"name": name, "strict": True}} for name in "fg"]
    (choice,) = gateway.chat(tools=strict, tool_choice={"type": "function", "function": {"name": "f"}}).json()[
        "choices"
    ]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 2
    template, generation = fake.received
    assert json.loads(values(template)["tools"][1][0]) == [
        {"type": "function", "function": {"name": name}} for name in "fg"
    ]
    assert values(generation)["prompt_token_ids"] == ("INT32", [*PROMPT_IDS, TOOL_CALLS_ID])
    schema = json.loads(values(generation)["guided_decoding_guide"][1][0])
    assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == ["f"]


def test_tool_choice_none_hides_the_tools_and_bans_calls(gateway: RunningGateway, fake: FakeTriton) -> None:
    gateway.chat(tools=TOOLS, tool_choice="none", logit_bias={"5": 1})
    sent = values(fake.received[0])
    assert "tools" not in sent
    assert sent["logit_bias_ids"] == ("INT32", [5, TOOL_CALLS_ID])
    assert sent["logit_bias_values"] == ("FP32", [1.0, -100.0])


def test_choices_of_several_prompts_are_numbered_through(gateway: RunningGateway, fake: FakeTriton) -> None:
    def script(received: Received) -> Iterator[Step]:
        (text,) = received.values("text_input")
        yield Pause(0.2 if text == "a" else 0.0)
        for index in (1, 0):
            reply = last(f"{text}{index}", [5], sequence_index=[index])
            yield Reply(reply.outputs, final=index == 0)

    fake.script = script
    answer = gateway.post("/v1/completions", prompt=["a", "b", "c"], n=2).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a0"), (1, "a1"), (2, "b0"), (3, "b1"), (4, "c0"), (5, "c1"),
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 21
    assert answer["usage"]["completion_tokens"] == 6
    chunks = events_of(gateway.post("/v1/completions", prompt=["a", "b"], n=2, stream=True))
    assert {(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in chunks} == {
        (0, "a0"), (1, "a1"), (2, "b0"), (3, "b1"),
    }  # fmt: skip


def test_one_bad_prompt_ends_the_others(gateway: RunningGateway, fake: FakeTriton) -> None:
    def script(received: Received) -> Iterator[Step]:
        if received.values("text_input") == ["bad"]:
            yield Failure("text_input: is bad")
        yield Reply({"text_output": ["x"], "token_ids": [5]})
        yield Pause(30.0)

    fake.script = script
    response = gateway.post("/v1/completions", prompt=["good", "bad"])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert fake.cancelled.wait(10)


def test_echo_scores_the_prompt_once_for_all_choices(gateway: RunningGateway, fake: FakeTriton) -> None:
    place = {
        "id": 5,
        "log_prob": -0.5,
        "rank": 1,
        "bytes": [72],
        "top": [{"id": 5, "log_prob": -0.5, "rank": 1, "bytes": [72]}],
    }

    def script(received: Received) -> list[Step]:
        if received.model == "postprocessing":
            assert received.values("token_ids") == [1]
            return [Reply({"text_output": ["<s>"]}, final=True)]
        drawn: Any = {"top_log_probs": [json.dumps([place])]}
        second = last("<s>HH", [1, 5, 5], **drawn, sequence_index=[1])
        first = last("<s>HH", [1, 5, 5], **drawn, sequence_index=[0], prompt_log_probs=[json.dumps([None, place])])
        return [Reply(second.outputs), first]

    fake.script = script
    for stream in (False, True):
        body: dict[str, Any] = {
            "prompt": [1, 5],
            "echo": True,
            "logprobs": 1,
            "n": 2,
            "max_tokens": 1,
            "stream": stream,
        }
        response = gateway.post("/v1/completions", **body)
        choices = [chunk["choices"][0] for chunk in events_of(response)] if stream else response.json()["choices"]
        assert sorted(choice["index"] for choice in choices) == [0, 1]
        for choice in choices:
            assert choice["text"] == "<s>HH"
            assert choice["logprobs"] == {
                "tokens": ["<s>", "H", "H"],
                "token_logprobs": [None, -0.5, -0.5],
                "top_logprobs": [None, {"H": -0.5}, {"H": -0.5}],
                "text_offset": [0, 3, 4],
            }
