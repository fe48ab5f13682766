"""The requests that genai-perf has perf_analyzer send to Triton's own ports, byte for byte.

Facts read from triton-inference-server/perf_analyzer, none of its code: genai-perf/genai_perf/inputs/converters/
(tensorrtllm_converter.py, triton_generate_converter.py) make the values, in this order; perf_analyzer writes JSON without
spaces (seen of the binary in tritonclient 2.51.0).
"""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import Answer, answer_from_events, ask, grpc_stream, post, reply_from_json, tensor
from tests.triton.live_server import LiveServer

PROMPT = "What is machine learning?"
Tensors = list[tuple[str, str, list[Any]]]


def call(server: LiveServer, made: Tensors) -> Answer:
    """A gRPC stream, as with `perf_analyzer -i grpc --streaming -b 1`: shapes [1, n], every output."""
    with grpc_stream(server) as stream:
        stream.send(inputs=[tensor(name, datatype, values) for name, datatype, values in made])
        return Answer(tuple(stream.until_final()))


# Converter `tensorrtllm`: {"text_input": [...], "max_tokens": [256], ...}; min_length with --output-tokens-mean-deterministic.
KSERVE: dict[str, Tensors] = {
    "defaults": [("text_input", "BYTES", [PROMPT]), ("max_tokens", "INT32", [256])],
    "--streaming": [("text_input", "BYTES", [PROMPT]), ("max_tokens", "INT32", [256]), ("stream", "BOOL", [True])],
    "--output-tokens-mean-deterministic": [
        ("text_input", "BYTES", [PROMPT]),
        ("max_tokens", "INT32", [16]),
        ("stream", "BOOL", [True]),
        ("min_length", "INT32", [16]),
    ],
}


@pytest.mark.parametrize("made", KSERVE.values(), ids=KSERVE)
def test_genai_perf_over_grpc(server: LiveServer, made: Tensors) -> None:
    answer = call(server, made)
    values = {name: value for name, _, (value,) in made}
    assert answer.summary() == ask(server, text_input=PROMPT, max_tokens=values["max_tokens"]).summary()
    if "min_length" in values:
        assert len(answer.ids()) == 16
    assert len(answer.replies) > 1 or "stream" not in values


GENERATE = b'{"text_input":["What is machine learning?"],"max_tokens":16}'
GENERATE_STREAM = b'{"text_input":["What is machine learning?"],"stream":true,"max_tokens":16}'


def test_genai_perf_over_generate(server: LiveServer) -> None:
    expected = ask(server, text_input=PROMPT, max_tokens=16)
    status, content = post(server, "ensemble/generate", GENERATE)
    assert status == 200, content
    assert Answer((reply_from_json(content),)).summary() == expected.summary()
    status, content = post(server, "ensemble/generate_stream", GENERATE_STREAM)
    assert status == 200, content
    assert answer_from_events(content).summary() == expected.summary()


def test_tensors_of_the_bare_tensorrt_llm_engine_are_refused_by_name(server: LiveServer) -> None:
    # Converter `tensorrtllm_engine`: the token-level model has other names here.
    made: Tensors = [
        ("input_ids", "INT32", [1, 1500]),
        ("input_lengths", "INT32", [2]),
        ("request_output_len", "INT32", [256]),
    ]
    with grpc_stream(server) as stream:
        stream.send("mistral_nemo", inputs=[tensor(name, datatype, values) for name, datatype, values in made])
        with pytest.raises(InferenceServerException, match="unexpected inference input"):
            stream.next()
