"""The requests that genai-perf has perf_analyzer send to an OpenAI server, byte for byte.

Facts read from triton-inference-server/perf_analyzer, none of its code: genai-perf/genai_perf/inputs/converters/
(openai_chat_completions_converter.py, openai_completions_converter.py) make the values, in this order; perf_analyzer
writes JSON without spaces (seen of the binary in tritonclient 2.51.0).
"""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from tests.gateway.test_openai_package import ANSWER

CHAT = b'{"model":"mistral-nemo","messages":[{"role":"user","content":"What is Tekken?"}]'
COMPLETION = b'{"model":"mistral-nemo","prompt":["What is Tekken?"]'
# --streaming, --output-tokens-mean, --extra-inputs.
ENDINGS: dict[str, bytes] = {
    "whole": b',"max_tokens":12,"temperature":0}',
    "--streaming": b',"stream":true,"max_tokens":12,"temperature":0}',
    "--extra-inputs": b',"stream":true,"max_tokens":12,"temperature":0,"ignore_eos":true,"min_tokens":12}',
    "usage": b',"stream":true,"max_tokens":12,"temperature":0,"stream_options":{"include_usage":true}}',
}


def post(base_url: str, path: str, body: bytes) -> list[dict[str, Any]]:
    """The objects of an answer; a stream must end in [DONE]."""
    headers = {"Content-Type": "application/json"}
    response = httpx2.post(f"{base_url}/v1/{path}", content=body, headers=headers, timeout=60.0)
    assert response.status_code == 200, response.text
    if not json.loads(body).get("stream"):
        return [response.json()]
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_chat(base_url: str, ending: bytes) -> None:
    objects = post(base_url, "chat/completions", CHAT + ending)
    choices = [choice for each in objects for choice in each["choices"]]
    parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    text = "".join(part.get("content") or "" for part in parts)
    assert text
    assert ANSWER.startswith(text)
    assert choices[-1]["finish_reason"] == "length"
    if b"usage" in ending or b"stream" not in ending:
        assert objects[-1]["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_completions_with_a_list_of_one_prompt(base_url: str, ending: bytes) -> None:
    objects = post(base_url, "completions", COMPLETION + ending)
    choices = [choice for each in objects for choice in each["choices"]]
    alone = post(base_url, "completions", COMPLETION.replace(b'["What is Tekken?"]', b'"What is Tekken?"') + ending)
    text = "".join(choice["text"] for choice in choices)
    assert text
    assert text == "".join(choice["text"] for each in alone for choice in each["choices"])
    assert choices[-1]["finish_reason"] == "length"


def test_defaults(base_url: str) -> None:
    """Without options neither max_tokens nor temperature is sent: sampled, up to the server's default."""
    (chat,) = post(base_url, "chat/completions", CHAT + b"}")
    assert chat["choices"][0]["finish_reason"] in ("stop", "length")
    assert 1 <= chat["usage"]["completion_tokens"] <= 256
    (completion,) = post(base_url, "completions", COMPLETION + b"}")
    assert completion["choices"][0]["finish_reason"] in ("stop", "length")
    assert 1 <= completion["usage"]["completion_tokens"] <= 16
