"""Requests that run while something happens to their server, each in a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.triton.calls import Answer, answer_from_events, ask, post, reply_from_json
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_for_metric

PROMPT: dict[str, Any] = {"prompt_token_ids": [1, 1500, 2600]}
NUM_KINDS = 5
only_in_make_faults = pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="takes long; runs in `make faults`")


def request_of(index: int, max_tokens: int) -> dict[str, Any]:
    """A request of its own for every index."""
    return PROMPT | {"max_tokens": max_tokens, "temperature": 1.0, "seed": index, "ignore_eos": True}


def answer(server: LiveServer, index: int, max_tokens: int) -> Answer:
    """One answer by one of five ways; an exception when it does not come whole."""
    request = request_of(index, max_tokens)
    match index % NUM_KINDS:
        case 0:
            return ask(server, **request, stream=True)
        case 1:
            return ask(server, **request)
        case 2:
            status, content = post(server, "ensemble/generate_stream", request | {"stream": True})
            assert status == 200, content
            return answer_from_events(content)
        case 3:
            status, content = post(server, "ensemble/generate", request)
            assert status == 200, content
            return Answer((reply_from_json(content),))
        case _:
            return ask(server, "mistral_nemo", **request, stream=True)


@contextmanager
def running(server: LiveServer, max_tokens: int, count: int = NUM_KINDS) -> Iterator[list[Future[Answer]]]:
    """`count` requests that the engine works on."""
    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(answer, server, index, max_tokens) for index in range(count)]
        wait_for_metric(server, "num_requests_running", count)
        yield answers
