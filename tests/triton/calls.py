"""Requests to a live server by real clients, and their answers with everything that was really sent."""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, model_config_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from tests.triton.live_server import PROJECT, LiveServer

CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Tensor:
    """One output as it came over the wire."""

    datatype: str
    shape: tuple[int, ...]
    values: list[Any]


@dataclass(frozen=True)
class Reply:
    """One response: its tensors, and whether it carried Triton's final flag."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    is_final: bool = False
    request_id: str = ""

    def value(self, name: str) -> Any:
        """The only value of a tensor."""
        (value,) = self.tensors[name].values
        return value

    def values(self, name: str) -> list[Any]:
        """All values of a tensor, none when it was not sent."""
        return self.tensors[name].values if name in self.tensors else []


@dataclass(frozen=True)
class Answer:
    """All responses to one request, by whatever way they came."""

    replies: tuple[Reply, ...]

    def of(self, sequence_index: int) -> list[Reply]:
        """The responses of one sequence."""
        return [reply for reply in self.replies if (reply.values("sequence_index") or [0]) == [sequence_index]]

    def text(self, sequence_index: int = 0) -> str:
        """The whole text of one sequence."""
        return "".join(text for reply in self.of(sequence_index) for text in reply.values("text_output"))

    def ids(self, sequence_index: int = 0) -> list[int]:
        """All ids of one sequence."""
        return [token_id for reply in self.of(sequence_index) for token_id in reply.values("token_ids")]

    def finish_reason(self, sequence_index: int = 0) -> str:
        """Why one sequence ended; it must have ended exactly once, with its last response."""
        reasons = [reply.values("finish_reason") for reply in self.of(sequence_index)]
        assert [bool(reason) for reason in reasons] == [False] * (len(reasons) - 1) + [True], reasons
        return str(reasons[-1][0])

    def summary(self, num_sequences: int = 1) -> list[tuple[str, list[int], str, str]]:
        """What must not depend on how an answer was cut or what else ran: text, ids, finish and stop reason."""
        return [
            (self.text(n), self.ids(n), self.finish_reason(n), self.of(n)[-1].value("stop_reason"))
            for n in range(num_sequences)
        ]


@cache
def declared_inputs(model: str) -> Mapping[str, str]:
    """KServe datatype of every input of a model, from its config.pbtxt."""
    text = (PROJECT / "model_repository" / model / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    names = {number: name for name, number in model_config_pb2.DataType.items()}
    return {each.name: names[each.data_type].removeprefix("TYPE_").replace("STRING", "BYTES") for each in config.input}


def tensors(inputs: Mapping[str, Any], model: str = "ensemble") -> list[InferInput]:
    """Inputs of shape [1, n], with the declared datatypes."""
    return [tensor(name, declared_inputs(model)[name], value) for name, value in inputs.items()]


def tensor(name: str, datatype: str, value: Any, shape: Sequence[int] | None = None) -> InferInput:
    """One input; `shape` other than [1, n] is for what must be refused."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if datatype == "BYTES":
        values = [each.encode() if isinstance(each, str) else each for each in values]
        array = np.array(values, dtype=np.object_)
    else:
        array = np.array(values, dtype=triton_to_np_dtype(datatype))
    array = array.reshape(tuple(shape) if shape is not None else (1, len(values)))
    return InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


class Stream:
    """One gRPC stream to the server: requests go in, replies come out in the order in which they came."""

    def __init__(self, client: InferenceServerClient, headers: Mapping[str, str] | None = None) -> None:
        self._client = client
        self._num_running = 0
        self._replies: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
        client.start_stream(lambda result, error: self._replies.put((result, error)), headers=headers)

    def send(
        self,
        model: str = "ensemble",
        request_id: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        inputs: Sequence[InferInput] = (),
        **values: Any,
    ) -> None:
        """Send a request; `inputs` are tensors made by hand."""
        self._num_running += 1
        self._client.async_stream_infer(
            model,
            [*inputs, *tensors(values, model)],
            outputs=[InferRequestedOutput(name) for name in outputs] or None,
            request_id=request_id,
            enable_empty_final_response=True,
            parameters=dict(parameters) if parameters else None,
        )

    def next(self, timeout_s: float = CALL_TIMEOUT_S) -> Reply:
        """The next response; InferenceServerException when it is an error, queue.Empty when none comes."""
        result, error = self._replies.get(timeout=timeout_s)
        if error is not None:
            self._num_running -= 1
            raise error
        reply = reply_from_grpc(result)
        self._num_running -= reply.is_final
        return reply

    def until_final(self, timeout_s: float = CALL_TIMEOUT_S) -> Iterator[Reply]:
        """Responses up to the one with the final flag."""
        is_final = False
        while not is_final:
            reply = self.next(timeout_s)
            is_final = reply.is_final
            yield reply

    def cancel(self) -> None:
        """Take everything on this stream back, as a client that goes away does."""
        self._client.stop_stream(cancel_requests=True)
        self._num_running = 0

    def close(self) -> None:
        """Take back what still runs, else end the stream in order."""
        self._client.stop_stream(cancel_requests=self._num_running > 0)

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for a while."""
        try:
            self._replies.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


@contextmanager
def grpc_stream(server: LiveServer) -> Iterator[Stream]:
    """A stream on a connection of its own."""
    with InferenceServerClient(server.grpc_url) as client:
        stream = Stream(client)
        try:
            yield stream
        finally:
            stream.close()


def ask(server: LiveServer, model: str = "ensemble", request_id: str = "", **values: Any) -> Answer:
    """One request over a gRPC stream, with all its responses; the stream must be silent afterwards."""
    with grpc_stream(server) as stream:
        stream.send(model, request_id, **values)
        return Answer(tuple(stream.until_final()))


def reply_from_grpc(result: Any) -> Reply:
    """Everything of a ModelInferResponse."""
    message = result.get_response()
    outputs = {}
    for output in message.outputs:
        values = result.as_numpy(output.name).reshape(-1).tolist()
        if output.datatype == "BYTES":
            values = [value.decode() for value in values]
        outputs[output.name] = Tensor(output.datatype, tuple(output.shape), values)
    return Reply(outputs, message.parameters["triton_final_response"].bool_param, message.id)


def post(
    server: LiveServer, path: str, body: Mapping[str, Any] | bytes, timeout_s: float = CALL_TIMEOUT_S
) -> tuple[int, bytes]:
    """POST to a model's path, such as `ensemble/generate`; status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=timeout_s)
    try:
        connection.request("POST", f"/v2/models/{path}", body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def generate(server: LiveServer, **body: Any) -> Reply:
    """`/generate`, which answers with one response."""
    status, content = post(server, "ensemble/generate", body)
    assert status == 200, content
    return reply_from_json(content)


def generate_stream(server: LiveServer, **body: Any) -> Answer:
    """`/generate_stream`: an answer of server-sent events."""
    status, content = post(server, "ensemble/generate_stream", body)
    assert status == 200, content
    return answer_from_events(content)


def answer_from_events(content: bytes) -> Answer:
    """Every event is one line `data: <JSON>` and an empty line."""
    events = content.decode().split("\n\n")
    assert events.pop() == "", content
    assert all(event.startswith("data: ") and "\n" not in event for event in events), content
    return Answer(tuple(reply_from_json(event.removeprefix("data: ").encode()) for event in events))


def reply_from_json(content: bytes) -> Reply:
    """JSON shows a tensor of one element as a scalar, and no datatype; HTTP has no final flag."""
    values = json.loads(content)
    assert "error" not in values, values
    return Reply(
        {
            name: Tensor("", (), value if isinstance(value, list) else [value])
            for name, value in values.items()
            if name not in ("model_name", "model_version", "sequence_end", "sequence_id", "sequence_start", "id")
        }
    )
