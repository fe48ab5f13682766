"""Log-probabilities, bias, bad words, grammars, prefix cache, priorities and preemption through the whole ensemble."""

from __future__ import annotations

import json
import math
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from client import Client, GenerationParams
from tests.triton.calls import Answer, ask, generate
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer, http_get, kill, wait_until
from tests.triton.metrics import read_metrics, wait_until_idle

PROMPT = "The quick brown fox"
LONG_PROMPT = [1, *range(1300, 1500)]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def guided(kind: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "text_input": PROMPT,
        "max_tokens": 120,
        "guided_decoding_guide_type": kind,
        "guided_decoding_guide": text,
        **more,
    }


def floats(answer: Answer, name: str) -> list[float]:
    return [value for reply in answer.replies for value in reply.values(name)]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_the_output(server: LiveServer, stream: bool) -> None:
    answer = ask(server, text_input=PROMPT, max_tokens=8, num_logprobs=3, stream=stream)
    drawn = floats(answer, "output_log_probs")
    assert len(drawn) == len(answer.ids()) == 8
    assert answer.replies[-1].value("cum_log_probs") == pytest.approx(sum(drawn), rel=1e-4)
    places = [place for reply in answer.replies for place in json.loads(reply.value("top_log_probs"))]
    for token_id, log_prob, place in zip(answer.ids(), drawn, places, strict=True):
        top = place["top"]
        assert [each["rank"] for each in top] == [1, 2, 3]
        assert (top[0]["id"], place["rank"]) == (token_id, 1), "greedy draws the most likely"
        assert top[0]["log_prob"] == pytest.approx(log_prob, rel=1e-5) == pytest.approx(place["log_prob"], rel=1e-5)
        assert top[0]["log_prob"] >= top[1]["log_prob"] >= top[2]["log_prob"]
        assert sum(math.exp(each["log_prob"]) for each in top) <= 1.0001
    text = b"".join(bytes(place["top"][0]["bytes"]) for place in places)
    assert text.decode("utf-8", "replace") == answer.text()


def test_return_log_probs_alone_sends_no_alternatives(server: LiveServer) -> None:
    answer = ask(server, text_input=PROMPT, max_tokens=3, return_log_probs=True)
    assert len(floats(answer, "output_log_probs")) == 3
    assert "top_log_probs" not in answer.replies[-1].tensors


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_package_gives_log_probabilities_and_follows_guides(server: LiveServer, protocol: Any) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    expected = ask(server, text_input=PROMPT, max_tokens=8, num_logprobs=3, prompt_logprobs=1)
    with Client(url, protocol=protocol, timeout_s=60.0) as client:
        params = GenerationParams(max_tokens=8, num_logprobs=3, prompt_logprobs=1)
        responses = list(client.generate(PROMPT, params))
        guide = GenerationParams(
            max_tokens=20, guided_decoding_guide_type="regex", guided_decoding_guide="[a-c]{3}-[0-9]{2}"
        )
        assert re.fullmatch("[a-c]{3}-[0-9]{2}", "".join(each.text for each in client.generate(PROMPT, guide)))
    assert [value for each in responses for value in each.output_log_probs] == pytest.approx(
        floats(expected, "output_log_probs"), rel=1e-6
    )
    assert responses[-1].cum_log_probs == pytest.approx(expected.replies[-1].value("cum_log_probs"), rel=1e-6)
    assert [place for each in responses for place in each.top_log_probs] == json.loads(
        expected.replies[-1].value("top_log_probs")
    )
    assert list(responses[-1].prompt_log_probs) == json.loads(expected.replies[-1].value("prompt_log_probs"))


def test_a_prompt_is_scored_without_generating(server: LiveServer) -> None:
    text = ask(server, text_input=PROMPT, max_tokens=6, num_logprobs=1)
    prompt = ask(server, text_input=PROMPT, max_tokens=1, exclude_input_in_output=False).ids()[:-1]
    scored = ask(server, prompt_token_ids=[*prompt, *text.ids()], max_tokens=0, prompt_logprobs=1)
    assert scored.ids() == []
    assert scored.replies[-1].value("num_output_tokens") == 0
    places = json.loads(scored.replies[-1].value("prompt_log_probs"))
    assert places[0] is None
    assert len(places) == len(prompt) + 6
    drawn = floats(text, "output_log_probs")
    assert [place["log_prob"] for place in places[-6:]] == pytest.approx(drawn, abs=1e-4), "decode and prefill agree"


def test_logit_bias_and_bad_words(server: LiveServer) -> None:
    plain = ask(server, text_input=PROMPT, max_tokens=4)
    first_id = plain.ids()[0]
    forced = ask(server, text_input=PROMPT, max_tokens=4, logit_bias_ids=[1500], logit_bias_values=[100.0])
    assert forced.ids() == [1500] * 4
    without = ask(server, text_input=PROMPT, max_tokens=4, logit_bias_ids=[first_id], logit_bias_values=[-100.0])
    assert first_id not in without.ids()
    word = forced.text()[: len(forced.text()) // 4]
    biased: dict[str, Any] = {"embedding_bias_words": [word], "embedding_bias_weights": [100.0]}
    assert ask(server, text_input=PROMPT, max_tokens=2, **biased).ids() == [1500] * 2
    bad = ask(server, text_input=PROMPT, max_tokens=4, bad_words=[word], **biased)
    assert 1500 not in bad.ids()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_followed(server: LiveServer, temperature: float) -> None:
    for seed in range(3):
        answer = ask(server, **guided("json_schema", json.dumps(SCHEMA), temperature=temperature, seed=seed))
        assert answer.finish_reason() == "stop"
        value = json.loads(answer.text())
        assert set(value) == {"name", "size"}
        assert len(value["name"]) <= 6
        assert value["size"] in ("small", "large")


def test_other_guides_are_followed(server: LiveServer) -> None:
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", ask(server, **guided("regex", "[a-c]{3}-[0-9]{2}")).text())
    choices = ["certainly so", "not at all", "perhaps: é"]
    assert ask(server, **guided("choice", json.dumps(choices))).text() in choices
    grammar = 'start: "a" NUMBER "b"\nNUMBER: /[0-9]{1,3}/'
    assert re.fullmatch("a[0-9]{1,3}b", ask(server, **guided("ebnf_grammar", grammar)).text())
    cut = ask(server, **guided("json_schema", json.dumps(SCHEMA), max_tokens=3))
    assert cut.finish_reason() == "length"
    assert cut.text().startswith("{")


def test_guided_answers_do_not_depend_on_what_else_runs(server: LiveServer) -> None:
    requests: list[dict[str, Any]] = [
        guided(kind, text, temperature=1.0, seed=seed)
        for seed in range(4)
        for kind, text in (("json_schema", json.dumps(SCHEMA)), ("regex", "[xyz]{4,9}!"))
    ] + [{"text_input": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": seed} for seed in range(8)]
    alone = [ask(server, **request).summary() for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = [each.result().summary() for each in [pool.submit(ask, server, **request) for request in requests]]
    assert together == alone


def test_an_equal_beginning_is_not_computed_again(idle_server: LiveServer) -> None:
    request: dict[str, Any] = {"prompt_token_ids": LONG_PROMPT, "max_tokens": 4, "cache_salt": "tenant a"}
    first, second = ask(idle_server, **request), ask(idle_server, **request)
    assert first.replies[-1].value("num_cached_tokens") == 0
    assert second.replies[-1].value("num_cached_tokens") == 192
    assert second.replies[-1].value("kv_cache_reused_blocks") == 3
    assert second.summary() == first.summary()
    other = ask(idle_server, **request | {"cache_salt": "tenant b"})
    assert other.replies[-1].value("num_cached_tokens") == 0
    assert other.summary() == first.summary()
    assert generate(idle_server, **request).value("num_cached_tokens") == 192


def test_samples_of_one_prompt_share_its_pages(server: LiveServer) -> None:
    request: dict[str, Any] = {
        "prompt_token_ids": LONG_PROMPT,
        "max_tokens": 6,
        "temperature": 1.0,
        "seed": 5,
        "cache_salt": "samples",
    }
    answer = ask(server, num_return_sequences=3, stream=True, **request)
    assert [answer.of(index)[-1].value("num_cached_tokens") for index in range(3)] == [0, 192, 192]
    assert answer.ids(0) == ask(server, **request).ids()
    assert len({tuple(answer.ids(index)) for index in range(3)}) == 3


def test_a_pool_that_is_too_small_changes_no_answer(server: LiveServer, start_server: StartServer) -> None:
    """1,024 tokens of KV for 12 requests of up to 420: pages go to the host and back all the time."""
    small = start_server(kv_cache_tokens="1024", kv_swap_ratio="8", max_step_tokens="64", max_num_seqs="12")
    requests: list[dict[str, Any]] = [
        {
            "prompt_token_ids": [1, *range(1300 + 7 * n, 1300 + 7 * n + 40 + 15 * n)],
            "max_tokens": 160,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": n,
            "priority": n % 3,
        }
        for n in range(12)
    ]
    expected = [ask(server, **request).summary() for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(ask, small, **request) for request in requests]
        assert [answer.result().summary() for answer in answers] == expected
    wait_until_idle(small)
    metrics = read_metrics(small)
    assert metrics["nemo_preemptions_total"] > 0
    assert metrics["nemo_swapped_pages_total"] > 0
    assert metrics["nemo_kv_pages_used"] == 0
    assert metrics["nemo_kv_pages_free"] + metrics["nemo_kv_pages_cached"] == 16
    small.stop()


def test_an_engine_that_stands_still_is_replaced(start_server: StartServer) -> None:
    server = start_server()
    pid = server.pid_of("engine")
    kill(pid, signal.SIGSTOP)
    wait_until(lambda: not server.is_ready(), 11.0, "the model stays ready although its engine is stopped")
    server.wait_until_ready()
    assert server.pid_of("engine") != pid
    assert ask(server, text_input=PROMPT, max_tokens=2).finish_reason() == "length"
    assert read_metrics(server)["nemo_engine_restarts_total"] == 1
    server.stop()


def test_the_engine_says_what_it_runs_on(server: LiveServer) -> None:
    status, body = http_get(server.metrics_port, "/metrics")
    assert status == 200
    info = re.search(rb"^nemo_engine_info{(.*)} 1$", body, re.MULTILINE)
    assert info is not None
    for label in (
        b'runner="torch"',
        b'batch_invariant="yes"',
        b'kv_cache="1,024 pages = 65,536 tokens',
        b'memory="weights ',
    ):
        assert label in info[1]
