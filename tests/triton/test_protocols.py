"""Every way in: gRPC streams, both HTTP endpoints, curl, our own client; and the same answer by all of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.aio import InferenceServerClient as AsyncClient
from tritonclient.utils import InferenceServerException

from client import Client, GenerationParams, Message, Protocol, RequestFailed
from tests.triton.calls import (
    CALL_TIMEOUT_S,
    Answer,
    Reply,
    answer_from_events,
    ask,
    generate,
    generate_stream,
    grpc_stream,
    post,
    reply_from_grpc,
    tensors,
)
from tests.triton.live_server import PROJECT, LiveServer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie spät ist es?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
PROMPTS: dict[str, dict[str, Any]] = {
    "text": {"text_input": "Grüße aus Straßburg, 你好"},
    "messages": {"messages": json.dumps(MESSAGES)},
    "tools": {"messages": json.dumps(MESSAGES), "tools": json.dumps([TOOL])},
    "ids": {"prompt_token_ids": [1, 1500, 2600, 3700]},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 2**64 - 1},
}


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_same_answer_by_every_way(server: LiveServer, prompt: dict[str, Any], sampling: dict[str, Any]) -> None:
    request = prompt | sampling | {"max_tokens": 24}
    whole = ask(server, **request)
    streamed = ask(server, **request, stream=True)
    assert len(whole.replies) == 1
    assert len(streamed.replies) > 1
    assert len(whole.ids()) == 24
    assert whole.text()
    assert streamed.summary() == whole.summary()
    assert Answer((generate(server, **request),)).summary() == whole.summary()
    assert generate_stream(server, **request).summary() == whole.summary()
    assert generate_stream(server, **request, stream=True).summary() == whole.summary()


def test_text_and_its_ids_are_the_same_prompt(server: LiveServer) -> None:
    text = ask(server, text_input="The", max_tokens=8)
    ids = ask(server, text_input="The", max_tokens=8, exclude_input_in_output=False).ids()
    prompt = ids[: text.replies[0].value("num_input_tokens")]
    assert prompt[0] == 1  # BOS
    assert ask(server, prompt_token_ids=prompt, max_tokens=8).summary() == text.summary()


def test_echo_puts_the_prompt_in_front(server: LiveServer) -> None:
    plain = ask(server, text_input="Über 你好", max_tokens=6)
    for stream in (False, True):
        echoed = ask(server, text_input="Über 你好", max_tokens=6, exclude_input_in_output=False, stream=stream)
        assert echoed.text() == "Über 你好" + plain.text()
        assert echoed.ids()[-6:] == plain.ids()
        assert echoed.replies[-1].value("num_output_tokens") == 6


def test_asynchronous_grpc_client(server: LiveServer) -> None:
    async def answer() -> Answer:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            inputs = tensors({"text_input": "Hello", "max_tokens": 12, "stream": True})
            yield {"model_name": "ensemble", "inputs": inputs, "enable_empty_final_response": True}

        replies: list[Reply] = []
        async with AsyncClient(server.grpc_url) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                replies.append(reply_from_grpc(result))
        return Answer(tuple(replies))

    streamed = asyncio.run(asyncio.wait_for(answer(), CALL_TIMEOUT_S))
    assert [reply.is_final for reply in streamed.replies] == [False] * (len(streamed.replies) - 1) + [True]
    assert streamed.summary() == ask(server, text_input="Hello", max_tokens=12).summary()


def test_unary_infer_is_refused(server: LiveServer) -> None:
    inputs = tensors({"text_input": "Hello", "max_tokens": 2})
    with (
        InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="decoupled") as refused,
    ):
        client.infer("ensemble", inputs, client_timeout=CALL_TIMEOUT_S)
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
    body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Hello"]}]}
    status, content = post(server, "ensemble/infer", body)
    assert status == 501
    assert b"decoupled" in content


def test_several_requests_on_one_grpc_stream_keep_their_ids(server: LiveServer) -> None:
    lengths = {"a": 3, "b": 9, "c": 6}
    with grpc_stream(server) as stream:
        for request_id, length in lengths.items():
            stream.send(request_id=request_id, text_input=request_id, max_tokens=length, stream=True)
        replies: list[Reply] = []
        while sum(reply.is_final for reply in replies) < len(lengths):
            replies.append(stream.next())
        assert stream.is_silent(0.3)
    for request_id, length in lengths.items():
        answer = Answer(tuple(reply for reply in replies if reply.request_id == request_id))
        assert answer.replies[-1].is_final
        assert answer.summary() == ask(server, text_input=request_id, max_tokens=length).summary()


def test_curl(server: LiveServer) -> None:
    body = json.dumps({"text_input": "Hello", "max_tokens": 5, "stream": True})
    url = f"http://{server.http_url}/v2/models/ensemble/generate_stream"
    command = ["curl", "--silent", "--no-buffer", "--fail", "--max-time", "60", url, "--data", body]
    done = subprocess.run(command, capture_output=True, timeout=CALL_TIMEOUT_S, check=True)
    assert answer_from_events(done.stdout).summary() == ask(server, text_input="Hello", max_tokens=5).summary()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("stream", [True, False])
def test_client_package(server: LiveServer, protocol: Protocol, stream: bool) -> None:
    messages: list[Message] = [*MESSAGES]
    params = GenerationParams(max_tokens=16, temperature=0.7, seed=5, num_return_sequences=2)
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with Client(url, protocol=protocol, timeout_s=CALL_TIMEOUT_S) as client:
        assert client.ready()
        responses = list(client.generate(messages=messages, tools=[TOOL], params=params, stream=stream))
    expected = ask(
        server, **PROMPTS["tools"], max_tokens=16, temperature=np.float32(0.7), seed=5, num_return_sequences=2
    )
    for index in (0, 1):
        own = [response for response in responses if response.sequence_index == index]
        assert "".join(response.text for response in own) == expected.text(index)
        assert [token_id for response in own for token_id in response.token_ids] == expected.ids(index)
        assert own[-1].finish_reason == expected.finish_reason(index)
    assert (len(responses) == 2) is not stream


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_package_gives_the_servers_own_words(server: LiveServer, protocol: Protocol) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with (
        Client(url, protocol=protocol, timeout_s=CALL_TIMEOUT_S) as client,
        pytest.raises(RequestFailed, match=r"max_tokens: must be at least 1 \(0 needs prompt_logprobs\), got 0"),
    ):
        list(client.generate("Hello", GenerationParams(max_tokens=0)))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_command(server: LiveServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    arguments = ["--raw", "Hello", "--max-tokens", "7", "--url", url, "--protocol", protocol]
    command = [sys.executable, "-m", "client", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=CALL_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().rstrip("\n") == ask(server, text_input="Hello", max_tokens=7).text().rstrip("\n")
    assert b"7 output tokens" in done.stderr
