"""Many different requests at once: each gets the answer it gets alone, and everything is given back."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.triton.calls import Answer, ask, generate, generate_stream, post
from tests.triton.live_server import LiveServer
from tests.triton.metrics import read_metrics, wait_until_idle

NUM_REQUESTS = 64
TEXTS = ("The", "Il était une fois", "你好，世界", "مرحبا بالعالم", "def main():\n", "Grüße 👩‍👩‍👧", "x" * 400, "")


def mixed_request(index: int) -> dict[str, Any]:
    """A request of its own for every index: prompt, length, sampling, penalties, samples, echo."""
    rng = random.Random(index)
    request: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.6}
    if rng.random() < 0.7:
        request["text_input"] = rng.choice(TEXTS) + str(index)
    else:
        request["prompt_token_ids"] = [rng.randrange(1000, 4096) for _ in range(rng.randint(1, 300))]
    if rng.random() < 0.6:
        request |= {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(2**64)}
        request |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 100, "top_p": 0.9}])
    if rng.random() < 0.3:
        request |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        request["num_return_sequences"] = rng.randint(2, 4)
    if rng.random() < 0.2:
        request["exclude_input_in_output"] = False
    return request


def with_stop(request: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """The same request, but every third ends at characters that its answer is known to have."""
    text = answer.text()
    if request["max_tokens"] % 3 or len(text) < 8 or "exclude_input_in_output" in request:
        return request
    return request | {"stop_words": ["never in it", text[len(text) // 2 :][:3]]}


def serve(server: LiveServer, index: int, request: dict[str, Any]) -> Any:
    """One answer, over gRPC or HTTP by turns, as what must not depend on the way or the company."""
    num_sequences = request.get("num_return_sequences", 1)
    if index % 4 == 1:
        return generate_stream(server, **request).summary(num_sequences)
    if index % 4 == 3 and num_sequences == 1 and not request["stream"]:
        return Answer((generate(server, **request),)).summary()
    return ask(server, **request).summary(num_sequences)


def test_mixed_requests_at_once_get_what_they_get_alone(idle_server: LiveServer) -> None:
    before = read_metrics(idle_server)
    requests = [mixed_request(index) for index in range(NUM_REQUESTS)]
    requests = [with_stop(request, ask(idle_server, **request)) for request in requests]
    alone = [serve(idle_server, index, request) for index, request in enumerate(requests)]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        together = list(pool.map(lambda indexed: serve(idle_server, *indexed), enumerate(requests)))
    assert together == alone
    assert sum("stop_words" in request for request in requests) > 5
    assert {reason for answer in alone for _, _, reason, _ in answer} >= {"length", "stop"}
    wait_until_idle(idle_server)
    after = read_metrics(idle_server)
    assert after["request_success_total"] - before["request_success_total"] == 3 * NUM_REQUESTS
    assert after["request_failure_total"] == before["request_failure_total"]


def test_bad_requests_do_not_disturb_good_ones(idle_server: LiveServer) -> None:
    good: dict[str, Any] = {"text_input": "Hello", "max_tokens": 60, "temperature": 1.0, "seed": 8}
    bad = {"text_input": "Hello", "top_p": 7.0}
    expected = ask(idle_server, **good).summary()

    def alternate(index: int) -> Any:
        if index % 2:
            return post(idle_server, "ensemble/generate", bad)[0]
        return ask(idle_server, **good, stream=True).summary()

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(alternate, range(16)))
    assert outcomes[1::2] == [400] * 8
    assert outcomes[::2] == [expected] * 8
