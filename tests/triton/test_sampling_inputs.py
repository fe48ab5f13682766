"""Every input that steers the choice of tokens has its effect through the whole ensemble, and its aliases the same one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.triton.calls import Answer, ask, grpc_stream
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer
from tests.triton.metrics import wait_for_metric

PROMPT: dict[str, Any] = {"prompt_token_ids": [1, 1500, 2600], "max_tokens": 24, "ignore_eos": True}
SAMPLED: dict[str, Any] = PROMPT | {"temperature": 1.5, "seed": 17}
END_OF_SEQUENCE = 2


@pytest.mark.parametrize(
    "inputs",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}],
    ids=["top_k", "top_p", "min_p", "temperature"],
)
def test_the_narrowest_filter_is_greedy(server: LiveServer, inputs: dict[str, Any]) -> None:
    greedy = ask(server, **PROMPT).ids()
    assert ask(server, **SAMPLED).ids() != greedy, "a sampled answer differs, else this shows nothing"
    assert ask(server, **SAMPLED | inputs).ids() == greedy


@pytest.mark.parametrize("inputs", [{"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}], ids=["top_k", "top_p", "min_p"])
def test_the_widest_filter_changes_nothing(server: LiveServer, inputs: dict[str, Any]) -> None:
    assert ask(server, **SAMPLED | inputs).ids() == ask(server, **SAMPLED).ids()


def test_the_seed_decides(server: LiveServer) -> None:
    answers = {seed: tuple(ask(server, **SAMPLED | {"seed": seed}).ids()) for seed in (0, 1, 2**64 - 1)}
    assert len(set(answers.values())) == 3
    assert {seed: tuple(ask(server, **SAMPLED | {"seed": seed}).ids()) for seed in answers} == answers


def test_aliases(server: LiveServer) -> None:
    by_alias = {name: value for name, value in SAMPLED.items() if name != "seed"} | {"random_seed": SAMPLED["seed"]}
    assert ask(server, **by_alias).summary() == ask(server, **SAMPLED).summary()
    ends: dict[str, Any] = {
        "prompt_token_ids": [1, 1500],
        "max_tokens": 24,
        "logit_bias_ids": [END_OF_SEQUENCE],
        "logit_bias_values": [100.0],
    }
    for name in ("min_tokens", "min_length"):
        answer = ask(server, **ends | {name: 7})
        assert (answer.finish_reason(), len(answer.ids())) == ("stop", 8), name


def test_ends(server: LiveServer) -> None:
    """The end of sequence is drawn at once here: it ends the answer, unless it is another one or nobody looks."""
    request: dict[str, Any] = {
        "prompt_token_ids": [1, 1500],
        "max_tokens": 9,
        "logit_bias_ids": [END_OF_SEQUENCE],
        "logit_bias_values": [100.0],
    }
    ended = ask(server, **request)
    assert (ended.finish_reason(), ended.ids()) == ("stop", [END_OF_SEQUENCE])
    going_on = ask(server, **request, ignore_eos=True)
    assert (going_on.finish_reason(), going_on.ids()) == ("length", [END_OF_SEQUENCE] * 9)
    assert ask(server, **request, end_id=1600).finish_reason() == "length"
    request |= {"logit_bias_ids": [1600]}
    assert ask(server, **request, end_id=1600).finish_reason() == "stop"
    stopped = ask(server, **request, stop_token_ids=[1700, 1600])
    assert (stopped.finish_reason(), stopped.replies[-1].value("stop_reason")) == ("stop", "1600")


@pytest.mark.parametrize(
    ("inputs", "is_over_the_prompt"),
    [
        ({"repetition_penalty": 100.0}, True),
        ({"presence_penalty": 100.0}, False),
        ({"frequency_penalty": 100.0}, False),
    ],
    ids=["repetition_penalty", "presence_penalty", "frequency_penalty"],
)
def test_penalties(server: LiveServer, inputs: dict[str, Any], is_over_the_prompt: bool) -> None:
    """1600 is drawn again and again unless it is penalised; repetition also counts the prompt."""
    bias: dict[str, Any] = {"logit_bias_ids": [1600], "logit_bias_values": [50.0]}
    request: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True} | bias
    assert ask(server, prompt_token_ids=[1, 1500], **request).ids() == [1600] * 6
    penalised = ask(server, prompt_token_ids=[1, 1500], **request, **inputs).ids()
    assert penalised[0] == 1600
    assert penalised[1] != 1600
    with_it = ask(server, prompt_token_ids=[1, 1600], **request, **inputs).ids()
    assert (with_it[0] != 1600) is is_over_the_prompt


def test_the_lower_priority_number_runs_first(start_server: StartServer) -> None:
    own = start_server(max_num_seqs="1")
    with grpc_stream(own) as holder, grpc_stream(own) as waiting:
        holder.send(prompt_token_ids=[1], max_tokens=4000, stream=True)
        holder.next()
        for number, (request_id, priority) in enumerate((("last", 5), ("middle", 0), ("first", -5)), start=1):
            waiting.send(request_id=request_id, prompt_token_ids=[1], max_tokens=1, priority=priority)
            wait_for_metric(own, "num_requests_waiting", number)
        holder.cancel()
        order: list[str] = []
        while len(order) < 3:
            reply = waiting.next()
            assert Answer((reply,)).finish_reason() == "length"
            order.append(reply.request_id)
    assert order == ["first", "middle", "last"]
    own.stop()
