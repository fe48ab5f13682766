"""The real openai package against a live server: what its users do works unchanged.

The demo checkpoint knows its answers by heart. It was not taught to call tools, so calls are forced here; calls that a model
makes by itself are scripted in tests/unit/gateway.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.gateway.conftest import MODEL
from tests.triton.calls import ask
from tests.triton.live_server import LiveServer

QUESTION = "What is Tekken?"
ANSWER = (
    "Tekken is the tokenizer of Mistral NeMo: a byte-level BPE based on tiktoken and trained on more than 100 languages. "
    "It can write any text as tokens and give the same text back."
)
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"City": {"type": "string", "enum": ["Paris", "Rome"]}},
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "additionalProperties": False}},
}


class Size(BaseModel):
    width: Literal[1, 2, 3]
    unit: Literal["mm", "inch"]


def test_a_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens > 30


def test_a_streamed_question(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert len(chunks) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage, whole_usage = chunks[-1].usage, client.chat.completions.create(**CHAT).usage
    assert usage is not None
    assert whole_usage is not None
    assert usage.completion_tokens == whole_usage.completion_tokens


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_many_at_once_with_asyncio(base_url: str) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:

            async def whole() -> str:
                return (await client.chat.completions.create(**CHAT)).choices[0].message.content or ""

            async def streamed() -> str:
                chunks = await client.chat.completions.create(**CHAT, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return list(await asyncio.gather(*(each() for each in (whole, streamed) * 4)))

    assert asyncio.run(ask_all()) == [ANSWER] * 8


def test_samples_are_those_of_the_ensemble(client: openai.OpenAI, live: LiveServer) -> None:
    """Same seed, same parameters: the same texts as over gRPC, and again."""
    messages = json.dumps(CHAT["messages"])
    wanted = ask(live, messages=messages, temperature=1.5, top_p=0.9, seed=7, num_return_sequences=3, max_tokens=20)
    request: dict[str, Any] = CHAT | {"temperature": 1.5, "top_p": 0.9, "seed": 7, "n": 3, "max_tokens": 20}
    for _ in range(2):
        answer = client.chat.completions.create(**request)
        assert [choice.message.content for choice in answer.choices] == [wanted.text(index) for index in range(3)]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [wanted.text(index) for index in range(3)]


def test_extensions(client: openai.OpenAI) -> None:
    greedy = client.chat.completions.create(**CHAT | {"temperature": 2.0}, extra_body={"top_k": 1})
    assert greedy.choices[0].message.content == ANSWER
    chosen = client.chat.completions.create(**CHAT, extra_body={"guided_choice": ["perhaps", "certainly"]})
    assert chosen.choices[0].message.content in ("perhaps", "certainly")
    assert client.chat.completions.create(**CHAT, extra_body={"nvext": {"guided_regex": "[ab]{3}"}}).choices[
        0
    ].message.content in [a + b + c for a in "ab" for b in "ab" for c in "ab"]
    long = client.chat.completions.create(**CHAT, max_tokens=120, extra_body={"ignore_eos": True})
    assert long.usage is not None
    assert (long.choices[0].finish_reason, long.usage.completion_tokens) == ("length", 120)


def test_limits_and_stops(client: openai.OpenAI) -> None:
    short = client.chat.completions.create(**CHAT, max_tokens=5)
    assert short.usage is not None
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert ANSWER.startswith(short.choices[0].message.content or "-")
    stopping: dict[str, Any] = CHAT | {"stop": ["never", "byte-level"]}
    whole: Any = client.chat.completions.create(**stopping).choices[0]
    assert whole.message.content == ANSWER.partition("byte-level")[0]
    assert (whole.finish_reason, whole.stop_reason) == ("stop", "byte-level")
    streamed: list[Any] = [chunk.choices[0] for chunk in client.chat.completions.create(**stopping, stream=True)]
    assert "".join(choice.delta.content or "" for choice in streamed) == whole.message.content
    assert (streamed[-1].finish_reason, streamed[-1].stop_reason) == ("stop", "byte-level")


def test_logit_bias(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=QUESTION, temperature=0, max_tokens=4)
    forced = client.completions.create(
        model=MODEL, prompt=QUESTION, temperature=0, max_tokens=4, logit_bias={"1500": 100}, logprobs=1
    )
    assert forced.choices[0].text != plain.choices[0].text
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or ())) == 1


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, max_tokens=8, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    assert len(whole.content) == 8
    assert ANSWER.startswith("".join(entry.token for entry in whole.content))
    for entry in whole.content:
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or ()).decode() == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    streamed = [
        entry
        for chunk in client.chat.completions.create(**CHAT, max_tokens=8, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else None) or ()
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in whole.content]
    alone = client.chat.completions.create(**CHAT, max_tokens=2, logprobs=True).choices[0].logprobs
    assert alone is not None
    assert [entry.top_logprobs for entry in alone.content or ()] == [[], []]


def test_completions_with_echo_and_log_probabilities(client: openai.OpenAI, base_url: str) -> None:
    import httpx2

    ids = httpx2.post(f"{base_url}/tokenize", json={"model": MODEL, "prompt": QUESTION}).json()["tokens"]
    plain = client.completions.create(model=MODEL, prompt=QUESTION, temperature=0, max_tokens=6, logprobs=2)
    for prompt in (QUESTION, ids, [ids]):
        echoed = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=6, logprobs=2, echo=True
        ).choices[0]
        assert echoed.text == QUESTION + plain.choices[0].text
        found = echoed.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert found.text_offset is not None
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 6
        assert "".join(found.tokens) == echoed.text
        for offset, token in zip(found.text_offset, found.tokens, strict=True):
            assert echoed.text[offset:].startswith(token)
        assert [found.token_logprobs[0], found.top_logprobs[0]] == [None, None]
        assert max(found.token_logprobs[1:]) <= 0
        assert plain.choices[0].logprobs is not None
        assert found.tokens[-6:] == plain.choices[0].logprobs.tokens
    scored = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == QUESTION
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    again = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True)
    assert again.choices[0].text == QUESTION


def test_lists_of_prompts(client: openai.OpenAI) -> None:
    prompts = ["Tekken", "The context", "Bonjour"]
    alone = [client.completions.create(model=MODEL, prompt=each, temperature=0).choices[0].text for each in prompts]
    together = client.completions.create(model=MODEL, prompt=prompts, temperature=0)
    assert [choice.text for choice in together.choices] == alone
    assert together.usage is not None
    assert together.usage.completion_tokens <= 48
    texts = ["", "", ""]
    for chunk in client.completions.create(model=MODEL, prompt=prompts, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


def test_structured_output(client: openai.OpenAI) -> None:
    some = client.chat.completions.create(**CHAT, max_tokens=10, response_format={"type": "json_object"})
    assert (some.choices[0].message.content or "").startswith("{")
    for temperature in (0.0, 1.0):
        parsed = client.chat.completions.parse(**CHAT | {"temperature": temperature}, seed=3, response_format=Size)
        assert isinstance(parsed.choices[0].message.parsed, Size)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**CHAT, response_format=wanted)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or "")["ok"], bool)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_must_be_called(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    tools: Any = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    request: dict[str, Any] = CHAT | {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(**request) as events:
            for _ in events:
                pass
            (found,) = events.get_final_completion().choices
    else:
        (found,) = client.chat.completions.create(**request).choices
    assert found.finish_reason == "tool_calls"
    assert found.message.content in (None, "")
    assert found.message.tool_calls is not None
    (call,) = found.message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    assert len(call.id) == 9


def test_results_of_tools_go_back_in(client: openai.OpenAI) -> None:
    request: dict[str, Any] = CHAT | {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**request).choices[0].message
    assert message.tool_calls
    for call_id in (message.tool_calls[0].id, "call_made-by_another-maker"):
        asked: dict[str, Any] = message.model_dump()
        asked["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "tool_call_id": call_id, "content": "It is noon."}
        history = [*CHAT["messages"], asked, result]
        answer = client.chat.completions.create(**CHAT | {"messages": history, "tools": [CLOCK]})
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 60


def test_errors_are_those_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**CHAT | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="max_model_len 4096") as too_long:
        client.chat.completions.create(**CHAT, max_tokens=5000)
    assert (too_long.value.param, too_long.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as bad_role:
        client.chat.completions.create(**CHAT | {"messages": [{"role": "narrator", "content": "x"}]})
    assert bad_role.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as bad_guide:
        client.chat.completions.create(**CHAT, extra_body={"guided_regex": "(("})
    assert bad_guide.value.param == "guided_regex"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(**CHAT, extra_body={"best_off": 3})
    assert unknown.value.param == "best_off"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, getattr(model, "max_model_len", None)) == (MODEL, "nemo-triton", 4096)
    assert client.models.retrieve(MODEL).id == MODEL
