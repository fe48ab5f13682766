"""The requests of TensorRT-LLM's clients, which this ensemble is a drop-in for: same tensors, datatypes, shapes and values.

Facts read from these sources, none of their code:

* triton-inference-server/tensorrtllm_backend: inflight_batcher_llm/client/end_to_end_grpc_client.py (gRPC stream, tensors
  [1, n]) and README.md (curl lines of /generate, early stopping by request id)
* triton-inference-server/server: python/openai/openai_frontend/engine/utils/triton.py, _create_trtllm_inference_request
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import Answer, Reply, ask, generate, grpc_stream, post, reply_from_json, tensor
from tests.triton.live_server import LiveServer

PROMPT = "What is machine learning?"
PERF_OUTPUTS = [
    "kv_cache_reused_blocks",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
]
Inputs = dict[str, tuple[str, Any]]

# What end_to_end_grpc_client.py sends with its defaults, but for temperature: its 1.0 would be sampled here without a seed.
DEFAULTS: Inputs = {
    "text_input": ("BYTES", PROMPT),
    "max_tokens": ("INT32", 12),
    "stream": ("BOOL", False),
    "beam_width": ("INT32", 1),
    "temperature": ("FP32", 1.0),
    "exclude_input_in_output": ("BOOL", False),
    "random_seed": ("UINT64", 7),
}
# Each of its flags, one by one.
FLAGS: dict[str, Inputs] = {
    "none": {},
    "--streaming": {"stream": ("BOOL", True)},
    "--num-return-sequences 1": {"num_return_sequences": ("INT32", 1)},
    "--repetition-penalty": {"repetition_penalty": ("FP32", 1.2)},
    "--presence-penalty": {"presence_penalty": ("FP32", 0.5)},
    "--frequency-penalty": {"frequency_penalty": ("FP32", 0.5)},
    "--stop-words": {"stop_words": ("BYTES", ["\n\n", "zzzzzz"])},
    "--end-id --pad-id": {"end_id": ("INT32", 2), "pad_id": ("INT32", 2)},
    "--return-perf-metrics": {"return_perf_metrics": ("BOOL", True)},
    "--exclude-input-in-output": {"exclude_input_in_output": ("BOOL", True)},
}


def call(server: LiveServer, inputs: Inputs, outputs: list[str], request_id: str = "") -> Answer:
    """The request as these clients make it: every tensor [1, n], outputs by name."""
    made = [tensor(name, datatype, value) for name, (datatype, value) in inputs.items()]
    with grpc_stream(server) as stream:
        stream.send(request_id=request_id, outputs=outputs, inputs=made)
        return Answer(tuple(stream.until_final()))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_end_to_end_grpc_client(server: LiveServer, flags: Inputs) -> None:
    answer = call(server, DEFAULTS | flags, ["text_output"], request_id="client")
    text = answer.text()
    assert {name for reply in answer.replies for name in reply.tensors} == {"text_output"}
    assert {reply.request_id for reply in answer.replies} == {"client"}
    assert all(reply.tensors["text_output"].shape == (1, 1) for reply in answer.replies)
    is_echoed = "--exclude-input-in-output" not in [name for name, value in FLAGS.items() if value is flags]
    assert text.startswith(PROMPT) is is_echoed
    assert len(text) > len(PROMPT) * is_echoed
    same = {name: value for name, (_, value) in (DEFAULTS | flags).items()}
    assert text == ask(server, **same).text()


def test_end_to_end_grpc_client_with_several_sequences(server: LiveServer) -> None:
    flags: Inputs = {"num_return_sequences": ("INT32", 3), "stream": ("BOOL", True)}
    answer = call(server, DEFAULTS | flags, ["text_output", "sequence_index"])
    assert len({answer.text(index) for index in range(3)}) == 3
    assert all(reply.tensors["sequence_index"].shape == (1, 1) for reply in answer.replies)


def test_end_to_end_grpc_client_reads_the_times_that_exist(server: LiveServer) -> None:
    flags: Inputs = {"return_perf_metrics": ("BOOL", True)}
    (reply,) = call(server, DEFAULTS | flags, ["text_output", *PERF_OUTPUTS]).replies
    assert all(reply.tensors[name].shape == (1, 1) for name in PERF_OUTPUTS)
    with pytest.raises(InferenceServerException, match="kv_cache_alloc_new_blocks"):
        call(server, DEFAULTS | flags, ["text_output", "kv_cache_alloc_new_blocks"])


def test_end_to_end_grpc_client_reads_log_probabilities(server: LiveServer) -> None:
    flags: Inputs = {"return_log_probs": ("BOOL", True), "exclude_input_in_output": ("BOOL", True)}
    (reply,) = call(server, DEFAULTS | flags, ["text_output", "cum_log_probs", "output_log_probs"]).replies
    log_probs = reply.tensors["output_log_probs"]
    assert (log_probs.datatype, log_probs.shape) == ("FP32", (1, 1, 12))
    assert reply.tensors["cum_log_probs"].shape == (1, 1)
    assert reply.value("cum_log_probs") == pytest.approx(sum(log_probs.values), rel=1e-4)
    assert max(log_probs.values) <= 0


REFUSED: dict[str, Inputs] = {
    "--beam-width 2": {"beam_width": ("INT32", 2)},
    "--return-context-logits": {"return_context_logits": ("BOOL", True)},
    "--return-generation-logits": {"return_generation_logits": ("BOOL", True)},
}
SUPPORTED: dict[str, Inputs] = {
    "--bad-words": {"bad_words": ("BYTES", ["Paris"])},
    "--embedding-bias-words": {"embedding_bias_words": ("BYTES", ["Paris"]), "embedding_bias_weights": ("FP32", [5.0])},
    "--return-log-probs": {"return_log_probs": ("BOOL", True)},
    "--guided-decoding-guide-type": {
        "guided_decoding_guide_type": ("BYTES", "json_schema"),
        "guided_decoding_guide": ("BYTES", '{"type": "boolean"}'),
    },
}


@pytest.mark.parametrize("flags", SUPPORTED.values(), ids=SUPPORTED)
def test_what_is_supported_is_accepted(server: LiveServer, flags: Inputs) -> None:
    answer = call(server, DEFAULTS | flags | FLAGS["--exclude-input-in-output"], ["text_output"])
    assert answer.text()
    if "guided_decoding_guide" in flags:
        assert answer.text() in ("true", "false")


@pytest.mark.parametrize("flags", REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(server: LiveServer, flags: Inputs) -> None:
    with pytest.raises(InferenceServerException, match=f"'ensemble', {next(iter(flags))}: "):
        call(server, DEFAULTS | flags, ["text_output"])


def test_undeclared_tensors_are_refused_by_name(server: LiveServer) -> None:
    with pytest.raises(InferenceServerException, match="num_draft_tokens"):
        call(server, DEFAULTS | {"num_draft_tokens": ("INT32", 4)}, ["text_output"])


def test_batch_inputs_are_refused(server: LiveServer) -> None:
    made = [
        tensor("text_input", "BYTES", [PROMPT, PROMPT], shape=(2, 1)),
        tensor("max_tokens", "INT32", [4, 4], shape=(2, 1)),
    ]
    with grpc_stream(server) as stream:
        stream.send(inputs=made)
        with pytest.raises(InferenceServerException, match="batch-size must be <= 1"):
            stream.next()


def test_readme_curl_line(server: LiveServer) -> None:
    body = {"text_input": PROMPT, "max_tokens": 20, "bad_words": "", "stop_words": ""}
    reply = generate(server, **body)
    assert Answer((reply,)).summary() == ask(server, text_input=PROMPT, max_tokens=20).summary()
    with_penalties = body | {"pad_id": 2, "end_id": 2, "top_k": 1, "temperature": 1.0, "return_log_probs": False}
    assert generate(server, **with_penalties).value("text_output") == reply.value("text_output")


def test_early_stopping_by_request_id(server: LiveServer) -> None:
    with grpc_stream(server) as running:
        running.send(request_id="early", text_input=PROMPT, max_tokens=3000, stream=True)
        first = running.next()
        made = [
            tensor("text_input", "BYTES", ""),
            tensor("max_tokens", "INT32", 0),
            tensor("stop", "BOOL", True),
        ]
        with grpc_stream(server) as stopping:
            stopping.send(request_id="early", inputs=made)
            (answer,) = stopping.until_final()
        assert answer.value("finish_reason") == "cancelled"
        rest = Answer((first, *running.until_final()))
    assert rest.finish_reason() == "cancelled"
    assert 0 < len(rest.ids()) < 3000


# What create_trtllm_inference_request sends for every request: OpenAI's defaults are sent too. It names the seed `seed`.
FRONT_END: Inputs = {
    "text_input": ("BYTES", PROMPT),
    "stream": ("BOOL", False),
    "max_tokens": ("INT32", np.int32(16)),
    "top_p": ("FP32", np.float32(1.0)),
    "frequency_penalty": ("FP32", np.float32(0.0)),
    "presence_penalty": ("FP32", np.float32(0.0)),
    "temperature": ("FP32", np.float32(1.0)),
    "seed": ("UINT64", np.uint64(3)),
}
# The parameters of a forced tool, as pydantic's model_dump_json() writes them.
FORCED_TOOL = (
    '{"type":"object","properties":{"city":{"type":"string","enum":["Paris","Rome"]},"days":{"type":"integer",'
    '"minimum":1,"maximum":9}},"required":["city","days"],"additionalProperties":false}'
)
FRONT_END_REQUESTS: dict[str, Inputs] = {
    "defaults": {},
    "stop and penalties": {
        "stop_words": ("BYTES", ["zzzzzz", "\n\n"]),
        "top_p": ("FP32", np.float32(0.9)),
        "frequency_penalty": ("FP32", np.float32(0.1)),
        "presence_penalty": ("FP32", np.float32(0.1)),
        "temperature": ("FP32", np.float32(0.7)),
    },
    "forced tool": {
        "guided_decoding_guide_type": ("BYTES", "json_schema"),
        "guided_decoding_guide": ("BYTES", FORCED_TOOL),
        "max_tokens": ("INT32", np.int32(64)),
    },
}


@pytest.mark.parametrize("changes", FRONT_END_REQUESTS.values(), ids=FRONT_END_REQUESTS)
def test_openai_front_end_of_triton(server: LiveServer, changes: Inputs) -> None:
    whole = call(server, FRONT_END | changes, [])
    streamed = call(server, FRONT_END | changes | {"stream": ("BOOL", True)}, [])
    assert streamed.summary() == whole.summary()
    # It takes one response of a request that is not streamed, with the final flag, and one string of every response.
    assert [reply.is_final for reply in whole.replies] == [True]
    assert {reply.tensors["text_output"].shape for reply in streamed.replies} == {(1, 1)}
    if "guided_decoding_guide" in changes:
        arguments = json.loads(whole.text())
        assert arguments["city"] in ("Paris", "Rome")
        assert arguments["days"] in range(1, 10)
    other_seed = FRONT_END | changes | {"seed": ("UINT64", np.uint64(4))}
    assert "guided_decoding_guide" in changes or call(server, other_seed, []).summary() != whole.summary()


def test_generate_with_the_shape_of_answers_that_clients_parse(server: LiveServer) -> None:
    status, content = post(server, "ensemble/generate", {"text_input": PROMPT, "max_tokens": 4})
    assert status == 200
    assert isinstance(reply_from_json(content), Reply)
    assert content.startswith(b"{")
    text = reply_from_json(content).tensors["text_output"].values
    assert len(text) == 1
    assert isinstance(text[0], str)
