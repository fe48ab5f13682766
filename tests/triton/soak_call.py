"""One request of a soak: by which way it goes, what becomes of it, and whether what came of its answer is right."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from tritonclient.utils import InferenceServerException

from tests.triton.calls import (
    Answer,
    Reply,
    answer_from_events,
    ask,
    declared_inputs,
    grpc_stream,
    post,
    reply_from_json,
)
from tests.triton.live_server import LiveServer

TIMEOUT_S = 180.0


class Way(Enum):
    """How a request goes in."""

    GRPC = "gRPC"
    GRPC_WHOLE = "gRPC, not streamed"
    EVENTS = "generate_stream"
    JSON = "generate"
    ENGINE = "gRPC, mistral_nemo"


class Fate(Enum):
    """What becomes of a request."""

    WHOLE = "whole"
    CANCELLED = "cancelled"
    CANCELLED_AT_ONCE = "cancelled at once"
    DEADLINE = "deadline"
    BAD = "bad"


class Bad(NamedTuple):
    """Inputs that must be refused with an error that begins with the field's name, by preprocessing or by the engine's model."""

    inputs: Mapping[str, Any]
    field: str
    is_refused_early: bool = False


BAD = (
    Bad({"top_p": 7.0}, "top_p"),
    Bad({"max_tokens": 0}, "max_tokens"),
    Bad({"max_tokens": 10**6}, "max_tokens"),
    Bad({"num_return_sequences": 129}, "num_return_sequences"),
    Bad({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "("}, "guided_decoding_guide"),
    Bad({"beam_width": 4}, "beam_width", is_refused_early=True),
)


@dataclass(frozen=True)
class Spoken:
    """What one sequence said, however it was cut: the whole, or a beginning of it."""

    ids: tuple[int, ...]
    text: str
    log_probs: tuple[float, ...]
    places: tuple[Any, ...]
    finish_reason: str
    stop_reason: str

    @classmethod
    def of(cls, answer: Answer, index: int) -> Spoken:
        """From the responses to one sequence."""
        replies = answer.of(index)
        reasons = [reason for reply in replies for reason in reply.values("finish_reason")]
        assert len(reasons) <= 1, f"ended {len(reasons)} times"
        assert not reasons or replies[-1].values("finish_reason"), "something came behind the end"
        return cls(
            tuple(answer.ids(index)),
            answer.text(index),
            tuple(float(np.float32(each)) for reply in replies for each in reply.values("output_log_probs")),
            tuple(place for reply in replies for text in reply.values("top_log_probs") for place in json.loads(text)),
            str(reasons[0]) if reasons else "",
            str(replies[-1].value("stop_reason")) if reasons else "",
        )


@dataclass(frozen=True)
class Truth:
    """A request and what it is answered when nothing else runs."""

    index: int
    inputs: Mapping[str, Any] = field(repr=False)
    spoken: tuple[Spoken, ...] = field(repr=False)

    @property
    def num_sequences(self) -> int:
        """How many samples it asks for."""
        return len(self.spoken)


def truth_of(server: LiveServer, index: int, inputs: dict[str, Any]) -> Truth:
    """Serve a request alone: nothing of its prompt is in the cache either. Some get a stop string that is in their answer."""
    num_sequences = inputs.get("num_return_sequences", 1)
    salted = {"cache_salt": f"alone {index}"}
    answer = ask(server, **inputs, **salted)
    text = answer.text()
    if index % 3 == 0 and len(text) >= 8 and "exclude_input_in_output" not in inputs:
        inputs = inputs | {"stop_words": ["never in it", text[len(text) // 2 :][:3]]}
        answer = ask(server, **inputs, **salted | {"cache_salt": f"alone again {index}"})
    return Truth(index, inputs, tuple(Spoken.of(answer, number) for number in range(num_sequences)))


@dataclass(frozen=True)
class Call:
    """One request to be sent. `num_replies`: after so many its client goes away; `bad`: which of BAD is added to it."""

    number: int
    truth: Truth
    way: Way
    fate: Fate
    num_replies: int = 0
    bad: int = 0
    priority: int = 0
    deadline_ms: int = 0
    cache_salt: str = ""

    @classmethod
    def draw(cls, rng: random.Random, number: int, truth: Truth) -> Call:
        """A random way and fate."""
        ways = [Way.GRPC, Way.GRPC, Way.GRPC_WHOLE, Way.EVENTS]
        ways += [Way.JSON] if truth.num_sequences == 1 else []
        ways += [Way.ENGINE] if set(truth.inputs) <= set(declared_inputs("mistral_nemo")) else []
        way = rng.choice(ways)
        fates = [Fate.WHOLE] * 14 + [Fate.DEADLINE] * 2 + [Fate.BAD] * 2
        if way in (Way.GRPC, Way.EVENTS, Way.ENGINE):
            fates += [Fate.CANCELLED] * 3 + [Fate.CANCELLED_AT_ONCE]
        fate = rng.choice(fates)
        if fate is Fate.BAD:
            way = Way.GRPC
        return cls(
            number,
            truth,
            way,
            fate,
            num_replies=rng.randint(1, 6),
            bad=rng.randrange(len(BAD)),
            priority=rng.choice([0, 0, 0, -1, 1, 2]),
            deadline_ms=rng.choice([1, 20, 100, 300, 1000]),
            cache_salt=rng.choice(["", "", "tenant"]),
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """All inputs of the request."""
        if self.fate is Fate.BAD:
            return {"text_input": f"bad {self.number}", **BAD[self.bad].inputs}
        inputs = {**self.truth.inputs, "priority": self.priority}
        if self.way not in (Way.GRPC_WHOLE, Way.JSON):
            inputs["stream"] = True
        if self.cache_salt:
            inputs["cache_salt"] = self.cache_salt
        if self.fate is Fate.DEADLINE:
            inputs["deadline_ms"] = self.deadline_ms
        return inputs


def call_server(server: LiveServer, call: Call) -> tuple[str, int]:
    """Send a call and check what comes (AssertionError when it is not right); what became of it, and how many ids came."""
    try:
        answer = _answer(server, call)
    except InferenceServerException as error:
        return _refused(call, error.message()), 0
    assert call.fate is not Fate.BAD, "a bad request was answered"
    num_ids = 0
    outcome = "whole"
    for index, expected in enumerate(call.truth.spoken):
        spoken = Spoken.of(answer, index)
        num_ids += len(spoken.ids)
        if spoken.finish_reason == expected.finish_reason:
            assert _without_text(call, spoken) == _without_text(call, expected), f"sample {index} is another"
            continue
        may_be_cut = call.fate in (Fate.CANCELLED, Fate.CANCELLED_AT_ONCE) or spoken.finish_reason == "deadline"
        assert may_be_cut, f"sample {index} ended with {spoken.finish_reason!r}"
        assert spoken.finish_reason != "deadline" or call.fate is Fate.DEADLINE, "there was no deadline"
        _check_beginning(call, spoken, expected)
        outcome = call.fate.value
    return outcome, num_ids


def _answer(server: LiveServer, call: Call) -> Answer:
    match call.way:
        case Way.GRPC | Way.GRPC_WHOLE | Way.ENGINE:
            return _grpc(server, call)
        case Way.EVENTS:
            return _events(server, call)
        case Way.JSON:
            status, content = post(server, "ensemble/generate", call.inputs, TIMEOUT_S)
            if status != 200:
                raise InferenceServerException(_error_in(content))
            return Answer((reply_from_json(content),))


def _grpc(server: LiveServer, call: Call) -> Answer:
    """Responses up to the final flag, behind which nothing may come; or so many until the client goes."""
    model = "mistral_nemo" if call.way is Way.ENGINE else "ensemble"
    replies: list[Reply] = []
    with grpc_stream(server) as stream:
        stream.send(model, str(call.number), **call.inputs)
        if call.fate is Fate.CANCELLED_AT_ONCE:
            stream.cancel()
            return Answer(())
        for reply in stream.until_final(TIMEOUT_S):
            replies.append(reply)
            if call.fate is Fate.CANCELLED and len(replies) == call.num_replies:
                stream.cancel()
                return Answer(tuple(replies))
    assert stream.is_silent(0.0), "something came behind the final flag"
    return Answer(tuple(replies))


def _events(server: LiveServer, call: Call) -> Answer:
    if call.fate not in (Fate.CANCELLED, Fate.CANCELLED_AT_ONCE):
        status, content = post(server, "ensemble/generate_stream", call.inputs, TIMEOUT_S)
        if status != 200 or content.startswith(b'data: {"error"'):
            raise InferenceServerException(_error_in(content))
        return answer_from_events(content)
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(call.inputs))
        if call.fate is Fate.CANCELLED_AT_ONCE:
            return Answer(())
        response = connection.getresponse()
        lines: list[bytes] = []
        while len(lines) < 2 * call.num_replies and (line := response.readline()):
            lines.append(line)
        return answer_from_events(b"".join(lines))
    finally:
        connection.close()


def _error_in(content: bytes) -> str:
    return str(json.loads(content.removeprefix(b"data: "))["error"])


def _refused(call: Call, message: str) -> str:
    """An error is right for a bad request, by its field's name, and for a deadline before the first token."""
    if call.fate is Fate.BAD:
        assert BAD[call.bad].field in message, message
        return "bad"
    assert call.fate is Fate.DEADLINE, f"refused: {message}"
    assert "deadline_ms: nothing was generated within" in message, message
    return "deadline, no token"


def _without_text(call: Call, spoken: Spoken) -> tuple[Any, ...]:
    """All of it; but for text and bytes, which the engine's own model does not send."""
    text = "" if call.way is Way.ENGINE else spoken.text
    places = () if call.way is Way.ENGINE else spoken.places
    return spoken.ids, text, spoken.log_probs, places, spoken.finish_reason, spoken.stop_reason


def _check_beginning(call: Call, spoken: Spoken, expected: Spoken) -> None:
    assert spoken.ids == expected.ids[: len(spoken.ids)], "the ids are no beginning of the right ones"
    assert spoken.log_probs == expected.log_probs[: len(spoken.log_probs)], "other log-probabilities"
    if call.way is not Way.ENGINE:
        assert spoken.places == expected.places[: len(spoken.places)], "other alternatives"
        # A deadline may fall inside a character, which is then shown as one that is broken; or inside a stop string.
        text = spoken.text.rstrip("\ufffd") if spoken.finish_reason else spoken.text
        assert expected.text.startswith(text) or spoken.text.startswith(expected.text), "another text"
