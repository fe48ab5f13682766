from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from backend.checkpoint.vocabulary import Vocabulary
from backend.errors import ConfigError, RequestError
from backend.text import chat as chat_module
from backend.text.chat import ChatTemplate, template_call_ids
from backend.text.tokenizer import Tokenizer
from tests.unit.text.samples import CONVERSATIONS, WEATHER


@pytest.fixture(scope="module")
def mistral() -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """The oracle: mistral-common's own reading, template and tokenizer."""
    return MistralTokenizer.v3(is_tekken=True)


def oracle_ids(
    mistral: MistralTokenizer[Any, Any, Any, Any, Any],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    prefix: bool = False,
) -> list[int]:
    request = ChatCompletionRequest.from_openai(messages, tools, continue_final_message=prefix)
    ids: list[int] = mistral.encode_chat_completion(request).tokens
    return ids


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_mistral_common(chat: ChatTemplate, mistral: Any, name: str) -> None:
    messages, tools = CONVERSATIONS[name]
    ids = chat.encode(json.dumps(messages), json.dumps(tools) if tools is not None else None)
    assert ids == oracle_ids(mistral, messages, tools)
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_the_template_by_hand(chat: ChatTemplate, tokenizer: Tokenizer) -> None:
    def text(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_bos=False)

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "[INST]"},
    ]
    tools = '[{"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}]'
    assert chat.encode(json.dumps(messages), '[{"type":"function","function":{"name":"clock"}}]') == [
        *(1, 3, *text("Hello"), 4, *text("Hi"), 2),
        *(5, *text(tools), 6, 3, *text("Be brief.\n\n[INST]"), 4),
    ]


def test_the_last_assistant_message_may_be_continued(chat: ChatTemplate, mistral: Any) -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two"}]
    ids = chat.encode(json.dumps([messages[0], messages[1] | {"prefix": True}]), None)
    assert ids == oracle_ids(mistral, messages, None, prefix=True)
    assert ids[-1] != 2


def test_what_an_openai_server_answered_may_be_sent_back(chat: ChatTemplate) -> None:
    question, follow_up = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
    answer: dict[str, Any] = {"role": "assistant", "content": "b"}
    neutral: dict[str, Any] = {
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert chat.encode(json.dumps([question, answer | neutral, follow_up]), None) == chat.encode(
        json.dumps([question, answer, follow_up]), None
    )


def tool_chat(first_id: str, second_id: str) -> str:
    calls = [
        {"id": first_id, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
        {"id": second_id, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
    ]
    return json.dumps(
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": second_id, "content": "2"},
            {"role": "tool", "tool_call_id": first_id, "content": "1"},
        ]
    )


def test_foreign_call_ids_are_mapped(chat: ChatTemplate) -> None:
    first, second = "call_62136354", "chatcmpl-tool-é"
    mapped = template_call_ids([first, second])
    assert chat.encode(tool_chat(first, second), None) == chat.encode(tool_chat(mapped[first], mapped[second]), None)


@given(st.lists(st.text(min_size=1, max_size=12) | st.from_regex("[a-zA-Z0-9]{9}", fullmatch=True), max_size=20))
@settings(max_examples=200)
def test_mapped_call_ids_are_valid_and_different(call_ids: list[str]) -> None:
    call_ids = [call_id.encode(errors="replace").decode() for call_id in call_ids]
    mapped = template_call_ids(call_ids)
    assert set(mapped) == set(call_ids)
    assert len(set(mapped.values())) == len(mapped)
    assert all(len(short) == 9 and short.isalnum() and short.isascii() for short in mapped.values())
    valid = [call_id for call_id in call_ids if len(call_id) == 9 and call_id.isalnum() and call_id.isascii()]
    assert all(mapped[call_id] == call_id for call_id in valid)


@pytest.mark.parametrize("call_id", ["abcdefghij", "abcdefghi\n", "abcdefgh", "abcdefgé1", "null"])
def test_near_misses_are_mapped(call_id: str) -> None:
    short = template_call_ids([call_id])[call_id]
    assert len(short) == 9
    assert short != call_id


def test_mapped_call_ids_avoid_those_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = template_call_ids(["call_1"])["call_1"]
    assert template_call_ids(["call_1", "call_2"])["call_1"] == wanted
    assert template_call_ids([wanted, "call_1"])["call_1"] != wanted
    assert template_call_ids(["call_1", wanted])[wanted] == wanted
    monkeypatch.setattr(chat_module, "_hashed_id", lambda call_id, attempt: f"{attempt:09}")
    assert template_call_ids(["a", "b", "000000001"]) == {"a": "000000000", "b": "000000002", "000000001": "000000001"}


def test_a_checkpoint_without_the_template_s_tokens_is_refused(vocabulary: Vocabulary) -> None:
    renamed = tuple("[OTHER]" if name == "[INST]" else name for name in vocabulary.special_tokens)
    with pytest.raises(ConfigError, match=r"\[INST\]"):
        ChatTemplate(dataclasses.replace(vocabulary, special_tokens=renamed))


TEXT_VALUES = st.sampled_from(["", "a", "[INST]", "é😀", '{"a": 1}', "[1,", "  "])
CALLS = st.builds(
    lambda call_id, name, arguments: {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    st.sampled_from(["abcdefghi", "123456789"]),
    st.sampled_from(["f", "get-it"]),
    TEXT_VALUES,
)
CONTENTS = TEXT_VALUES | st.lists(TEXT_VALUES.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
MESSAGES = st.one_of(
    st.builds(lambda content: {"role": "user", "content": content}, CONTENTS),
    st.builds(lambda content: {"role": "system", "content": content}, CONTENTS),
    st.builds(lambda content: {"role": "assistant", "content": content}, CONTENTS),
    st.builds(lambda calls: {"role": "assistant", "tool_calls": calls}, st.lists(CALLS, min_size=1, max_size=2)),
    st.builds(lambda content: {"role": "tool", "tool_call_id": "abcdefghi", "content": content}, CONTENTS),
)


@given(messages=st.lists(MESSAGES, min_size=1, max_size=5), with_tools=st.booleans())
@settings(max_examples=300)
def test_any_order_of_messages_is_refused_or_has_the_same_ids(
    chat: ChatTemplate, mistral: Any, messages: list[dict[str, Any]], with_tools: bool
) -> None:
    tools = [WEATHER] if with_tools else None
    tools_json = json.dumps(tools) if tools else None
    ids: list[int] | None = None
    problem: RequestError | None = None
    try:
        ids = chat.encode(json.dumps(messages), tools_json)
    except RequestError as error:
        problem = error
    assert problem is None or problem.field == "messages"
    assert ids is None or ids == oracle_ids(mistral, messages, tools)
