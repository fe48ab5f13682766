"""The client as a library, over both protocols, against a server that speaks them on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from client import (
    BrokenStream,
    Client,
    GenerationParams,
    Protocol,
    RequestFailed,
    Response,
    ServerUnreachable,
    TimedOut,
)
from tests.unit.client.fake_triton import Drop, EarlyEnd, Failure, FakeTriton, Pause, Received, Reply, Step

HELLO = [Reply({"text_output": ["Hel"], "token_ids": [1, 2]}), Reply({"text_output": ["lo"], "token_ids": [3]})]
LAST_OUTPUTS: dict[str, list[Any]] = {
    "text_output": ["!"],
    "token_ids": [4, 5],
    "finish_reason": ["stop"],
    "stop_reason": ["END"],
    "num_input_tokens": [7],
    "num_output_tokens": [5],
    "num_cached_tokens": [0],
    "kv_cache_reused_blocks": [0],
}
LAST = Reply(LAST_OUTPUTS, final=True)
LAST_RESPONSE = Response("!", (4, 5), 0, "stop", "END", 7, 5, 0)


def hello(_: Received) -> list[Step]:
    return [*HELLO, LAST]


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton(hello) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    value: Protocol = request.param
    return value


@pytest.fixture
def client(fake: FakeTriton, protocol: Protocol) -> Iterator[Client]:
    with Client(fake.address(protocol), protocol=protocol) as made:
        yield made


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_yields_every_response_with_what_it_carries(client: Client) -> None:
    assert list(client.generate("Hi")) == [Response("Hel", (1, 2)), Response("lo", (3,)), LAST_RESPONSE]


def test_responses_come_while_the_server_is_still_at_it(fake: FakeTriton, client: Client) -> None:
    go_on = threading.Event()

    def script(_: Received) -> Iterator[Step]:
        yield HELLO[0]
        assert go_on.wait(10)
        yield LAST

    fake.script = script
    responses = client.generate("Hi")
    assert next(responses).text == "Hel"
    go_on.set()
    assert list(responses) == [LAST_RESPONSE]


def test_sends_what_is_set_and_nothing_else(fake: FakeTriton, client: Client, protocol: Protocol) -> None:
    params = GenerationParams(
        max_tokens=5, temperature=0.5, seed=2**64 - 1, stop_words=("a", "é"), ignore_eos=True, logit_bias={9: -1.5}
    )
    list(client.generate("Hi", params, request_id="r1"))
    list(client.generate(messages=[{"role": "user", "content": "é"}], tools=[{"type": "function"}], stream=False))
    list(client.generate(prompt_token_ids=[1, 2, 3]))
    first, second, third = fake.received
    assert (first.model, first.request_id) == ("ensemble", "r1")
    expected = {
        "text_input": ("BYTES", ["Hi"]),
        "max_tokens": ("INT32", [5]),
        "temperature": ("FP32", [0.5]),
        "seed": ("UINT64", [2**64 - 1]),
        "stop_words": ("BYTES", ["a", "é"]),
        "ignore_eos": ("BOOL", [True]),
        "logit_bias_ids": ("INT32", [9]),
        "logit_bias_values": ("FP32", [-1.5]),
        "stream": ("BOOL", [True]),
    }
    assert {name: first.values(name) for name in first.inputs} == {name: value[1] for name, value in expected.items()}
    assert second.inputs.keys() == {"messages", "tools", "stream"}
    assert json.loads(second.values("messages")[0]) == [{"role": "user", "content": "é"}]
    assert second.values("stream") == [False]
    assert third.values("prompt_token_ids") == [1, 2, 3]
    if protocol == "grpc":
        assert {name: (value[0], value[2]) for name, value in first.inputs.items()} == expected
        assert all(value[1] == (1, len(value[2])) for value in first.inputs.values())
        assert first.parameters["triton_enable_empty_final_response"] is True
    else:
        assert first.inputs["temperature"] == 0.5  # one element is a scalar in JSON
        assert first.parameters["path"] == "/v2/models/ensemble/generate_stream"


def test_stop_names_the_requests_by_their_id(fake: FakeTriton, client: Client) -> None:
    fake.script = lambda _: [Reply({"finish_reason": ["cancelled"]}, final=True)]
    client.stop("mine")
    (received,) = fake.received
    assert (received.request_id, {name: received.values(name) for name in received.inputs}) == (
        "mine",
        {"stop": [True]},
    )
    with pytest.raises(ValueError, match=r"^request_id: "):
        client.stop("")


def test_samples_are_told_apart(fake: FakeTriton, client: Client) -> None:
    def script(received: Received) -> Iterator[Step]:
        for index in range(received.values("num_return_sequences")[0]):
            yield Reply({"text_output": [f"{index}"], "token_ids": [index], "sequence_index": [index]})
        for index in (2, 0, 1):
            yield Reply({**LAST_OUTPUTS, "sequence_index": [index]}, final=index == 1)

    fake.script = script
    responses = list(client.generate("Hi", GenerationParams(num_return_sequences=3)))
    assert [response.sequence_index for response in responses] == [0, 1, 2, 2, 0, 1]
    assert [response.finish_reason for response in responses] == ["", "", "", "stop", "stop", "stop"]


def test_requests_at_once_get_only_their_own_responses(fake: FakeTriton, client: Client) -> None:
    def script(received: Received) -> Iterator[Step]:
        text = received.values("text_input")[0]
        for _ in range(5):
            yield Reply({"text_output": [text], "token_ids": [int(text)]})
            yield Pause(0.01)
        yield Reply({**LAST_OUTPUTS, "text_output": [text], "token_ids": [int(text)]}, final=True)

    fake.script = script
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = "".join(response.text for response in client.generate(str(number)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert texts == {number: str(number) * 6 for number in range(12)}


def test_two_iterators_of_one_thread_may_interleave(client: Client) -> None:
    pairs = list(zip(client.generate("a"), client.generate("b"), strict=True))
    assert [first for first, _ in pairs] == [second for _, second in pairs] == list(client.generate("c"))


def test_closing_early_cancels_at_the_server(fake: FakeTriton, client: Client) -> None:
    fake.script = lambda _: [HELLO[0], Pause(20), LAST]
    responses = client.generate("Hi")
    next(responses)
    assert not fake.cancelled.is_set()
    responses.close()
    assert fake.cancelled.wait(5)


@pytest.mark.parametrize("way", ["grpc", "http", "http, closing"])
def test_an_error_ends_the_request_even_while_the_error_is_kept(fake: FakeTriton, way: str) -> None:
    # The error keeps the frames of the request alive, so nothing is cancelled by their mere end.
    fake.script = lambda _: [HELLO[0], Failure("no"), Pause(20), LAST]
    fake.http_closes = way == "http, closing"
    protocol: Protocol = "grpc" if way == "grpc" else "http"
    client = Client(fake.address(protocol), protocol=protocol)
    with pytest.raises(RequestFailed) as kept:
        list(client.generate("Hi"))
    assert fake.cancelled.wait(5)
    assert kept.value.__traceback__ is not None
    client.close()


def test_a_finished_request_is_not_cancelled_and_the_client_goes_on(fake: FakeTriton, client: Client) -> None:
    assert [len(list(client.generate("Hi"))) for _ in range(3)] == [3, 3, 3]
    assert not fake.cancelled.is_set()


@pytest.mark.parametrize("before", [[], HELLO], ids=["at once", "mid-stream"])
def test_an_error_of_the_server_is_raised_with_its_message(
    fake: FakeTriton, client: Client, before: list[Step]
) -> None:
    fake.script = lambda _: [*before, Failure("max_tokens: at least 1,\nnot 0")]
    responses = client.generate("Hi")
    for _ in before:
        next(responses)
    with pytest.raises(RequestFailed, match=r"^max_tokens: at least 1, not 0$"):
        next(responses)


def test_errors_that_come_before_any_model(fake: FakeTriton) -> None:
    with Client(fake.http_address, protocol="http", model="other") as client:
        with pytest.raises(RequestFailed, match=r"^Request for unknown model: 'other' is not found$"):
            next(client.generate("Hi"))
        client.model = "behind a proxy"
        with pytest.raises(RequestFailed, match=r"^HTTP 502: <html>bad gateway</html>$"):
            next(client.generate("Hi"))


@pytest.mark.parametrize("break_off", [Drop(), EarlyEnd()], ids=["connection lost", "no final response"])
def test_an_answer_that_is_cut_off_is_an_error(fake: FakeTriton, client: Client, break_off: Step) -> None:
    fake.script = lambda _: [*HELLO, break_off]
    responses = client.generate("Hi")
    assert [next(responses).text, next(responses).text] == ["Hel", "lo"]
    with pytest.raises(BrokenStream):
        next(responses)


def test_every_sample_must_be_finished(fake: FakeTriton, client: Client) -> None:
    fake.script = lambda _: [Reply({**LAST_OUTPUTS, "sequence_index": [0]}), EarlyEnd()]
    with pytest.raises(BrokenStream):
        list(client.generate("Hi", GenerationParams(num_return_sequences=2)))


def test_nobody_listening_names_the_remedy(protocol: Protocol) -> None:
    address = f"127.0.0.1:{free_port()}"
    with Client(address, protocol=protocol) as client:
        with pytest.raises(ServerUnreachable, match=rf"{address}: start one with `make serve`"):
            next(client.generate("Hi"))
        assert not client.ready()


def test_timeout_bounds_the_request_as_a_whole(fake: FakeTriton, protocol: Protocol) -> None:
    fake.script = lambda _: [step for _ in range(40) for step in (HELLO[0], Pause(0.1))]
    started_s = time.monotonic()
    with Client(fake.address(protocol), protocol=protocol, timeout_s=0.6) as client:
        responses = client.generate("Hi")
        with pytest.raises(TimedOut, match=r"0\.6 s"):
            list(responses)
    assert 0.5 < time.monotonic() - started_s < 3
    assert fake.cancelled.wait(5)


def test_ready_is_what_the_server_says(fake: FakeTriton, client: Client, protocol: Protocol) -> None:
    assert client.ready()
    fake.ready = False
    assert not client.ready()
    fake.ready = True
    with Client(fake.address(protocol), protocol=protocol, model="other") as other:
        assert not other.ready()


@pytest.mark.parametrize("text", ["é", "日本語", "👩‍👩‍👧", "مرحبا", '"\\\n\r\t', "", "x" * 100_000])
def test_text_arrives_as_it_was_sent(fake: FakeTriton, client: Client, text: str) -> None:
    # The fake cuts each event in the middle of its bytes, so also within a character.
    fake.script = lambda _: [Reply({**LAST_OUTPUTS, "text_output": [text]}, final=True)]
    assert [response.text for response in client.generate(text)] == [text]
    assert fake.received[0].values("text_input") == [text]


def test_empty_outputs_are_an_empty_response(fake: FakeTriton, client: Client) -> None:
    fake.script = lambda _: [Reply({"text_output": [], "token_ids": []}), LAST]
    assert list(client.generate("Hi")) == [Response(), LAST_RESPONSE]


def test_what_is_not_utf8_is_an_error(fake: FakeTriton) -> None:
    fake.script = lambda _: [Reply({"text_output": [b"\xff"]}, final=True)]
    with Client(fake.grpc_address) as client, pytest.raises(BrokenStream, match="text_output: not UTF-8"):
        list(client.generate("Hi"))


def test_output_of_the_wrong_type_is_an_error(fake: FakeTriton) -> None:
    fake.script = lambda _: [Reply({"token_ids": ["x"]}, final=True)]
    with Client(fake.http_address, protocol="http") as client, pytest.raises(BrokenStream, match="wrong type"):
        list(client.generate("Hi"))
