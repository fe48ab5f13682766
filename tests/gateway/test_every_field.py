"""Every request field, sent to a live server over plain HTTP: accepted with a value that has a meaning, refused by its name
with one that has none."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from client.gateway.chat_request import ChatRequest
from client.gateway.completion_request import CompletionRequest
from tests.gateway.conftest import MODEL

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is Tekken?"}], "max_tokens": 8}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "What is Tekken?", "max_tokens": 8}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}

# Field -> (what is sent, a value to refuse). A chat and a completion take the same unless the field names its own.
VALUES: dict[str, tuple[dict[str, Any], Any]] = {
    "bad_words": ({"bad_words": ["Tekken"]}, 5),
    "best_of": ({"best_of": 1, "n": 1}, 2),
    "cache_salt": ({"cache_salt": "tenant"}, "x" * 257),
    "echo": ({"echo": True}, "yes"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, 2.5),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, []),
    "guided_grammar": ({"guided_grammar": 'start: "yes" | "no"'}, "start: ("),
    "guided_json": ({"guided_json": SCHEMA, "max_tokens": 30}, 5),
    "guided_regex": ({"guided_regex": "[ab]{3}"}, "(("),
    "ignore_eos": ({"ignore_eos": True}, 1),
    "logit_bias": ({"logit_bias": {"1500": 1}}, {"1500": 101}),
    "max_completion_tokens": ({"max_completion_tokens": 8}, 0),
    "max_tokens": ({"max_tokens": 8}, -1),
    "messages": ({}, []),
    "metadata": ({"metadata": {"a": "b"}}, {"a": 1}),
    "min_p": ({"min_p": 0.1}, 1.5),
    "min_tokens": ({"min_tokens": 4}, 9),
    "modalities": ({"modalities": ["text"]}, ["audio"]),
    "model": ({}, 5),
    "n": ({"n": 2}, 129),
    "nvext": ({"nvext": {"top_k": 5, "repetition_penalty": 1.1, "guided_regex": "[ab]{3}"}}, {"top_k": "5"}),
    "parallel_tool_calls": ({"parallel_tool_calls": False}, "no"),
    "presence_penalty": ({"presence_penalty": -0.5}, -2.5),
    "priority": ({"priority": -5}, 1001),
    "prompt": ({}, [[1, "a"]]),
    "prompt_cache_key": ({"prompt_cache_key": "k"}, 5),
    "repetition_penalty": ({"repetition_penalty": 1.2}, 0),
    "response_format": ({"response_format": {"type": "json_object"}}, {"type": "xml"}),
    "safety_identifier": ({"safety_identifier": "k"}, 5),
    "seed": ({"seed": 7}, 1.5),
    "service_tier": ({"service_tier": "auto"}, "flex"),
    "stop": ({"stop": ["zzzz"]}, 5),
    "stop_token_ids": ({"stop_token_ids": [1500]}, ["a"]),
    "store": ({"store": False}, True),
    "stream": ({"stream": True}, 1),
    "stream_options": ({"stream": True, "stream_options": {"include_usage": True}}, {"include_usage": True}),
    "suffix": ({"suffix": ""}, "the end"),
    "temperature": ({"temperature": 0.7}, 2.5),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "none"}, "required"),
    "tools": ({"tools": [TOOL]}, []),
    "top_k": ({"top_k": 5}, -2),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 2}, 21),
    "top_p": ({"top_p": 0.5}, 1.5),
    "user": ({"user": "k"}, 5),
}
LOGPROBS: dict[str, tuple[dict[str, Any], Any]] = {
    "chat/completions": ({"logprobs": True}, 2),
    "completions": ({"logprobs": 2}, True),
}
ROUTES: dict[str, tuple[type[ChatRequest | CompletionRequest], dict[str, Any]]] = {
    "chat/completions": (ChatRequest, CHAT),
    "completions": (CompletionRequest, COMPLETION),
}
CASES = [(route, name) for route, (kind, _) in ROUTES.items() for name in kind.model_fields]


@pytest.mark.parametrize(("route", "name"), CASES)
def test_every_field(base_url: str, route: str, name: str) -> None:
    fields, wrong = LOGPROBS[route] if name == "logprobs" else VALUES[name]
    body = ROUTES[route][1]
    url = f"{base_url}/v1/{route}"
    accepted = httpx2.post(url, json=body | fields, timeout=60.0)
    assert accepted.status_code == 200, accepted.text
    if not fields.get("stream"):
        assert len(accepted.json()["choices"]) == fields.get("n", 1)
    refused = httpx2.post(url, json=body | {name: wrong}, timeout=60.0)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"].split("[")[0].split(".")[0] == name, error
    assert error["type"] == "invalid_request_error"


def test_tokenizer_info(base_url: str) -> None:
    info = httpx2.get(f"{base_url}/tokenizer_info", timeout=30.0).json()
    assert (info["bos_token"], info["eos_token"], info["model_max_length"]) == ("<s>", "</s>", 4096)
