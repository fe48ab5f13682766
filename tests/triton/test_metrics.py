"""The metrics port: the names that dashboards ask for, and values that follow a scripted run exactly."""

from __future__ import annotations

import pytest
from tritonclient.utils import InferenceServerException

from tests.triton.calls import ask, grpc_stream
from tests.triton.live_server import LiveServer, http_get
from tests.triton.metrics import read_metrics, wait_for_metric, wait_until_idle

GAUGES = ("num_requests_running", "num_requests_waiting", "num_request_max", "gpu_cache_usage_perc")
COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "request_failure_total",
    'request_finish_total{finished_reason="stop"}',
    'request_finish_total{finished_reason="length"}',
    'request_finish_total{finished_reason="cancelled"}',
    'request_finish_total{finished_reason="deadline"}',
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)


def test_names_kinds_and_help(server: LiveServer) -> None:
    status, body = http_get(server.metrics_port, "/metrics")
    assert status == 200
    lines = body.decode().splitlines()
    kinds = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    helps = dict(line.removeprefix("# HELP ").split(" ", 1) for line in lines if line.startswith("# HELP "))
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        for name in {name.partition("{")[0] for name in names}:
            assert kinds[name] == kind
            assert len(helps[name]) > 10
    samples = read_metrics(server)
    assert {*GAUGES, *COUNTERS} <= set(samples)
    assert {f"{name}_{part}" for name in HISTOGRAMS for part in ("count", "sum")} <= set(samples)
    assert any(name.startswith("nv_inference_request_success") for name in samples), "Triton's own must stay"
    assert samples["num_request_max"] == 256


def test_values_follow_a_scripted_run(idle_server: LiveServer) -> None:
    before = read_metrics(idle_server)
    ask(idle_server, prompt_token_ids=[1] * 10, max_tokens=5)
    ask(idle_server, prompt_token_ids=[1] * 20, max_tokens=7, stream=True, num_return_sequences=3)
    first_id = ask(idle_server, "mistral_nemo", prompt_token_ids=[1] * 30, max_tokens=1).ids()[0]
    ask(idle_server, prompt_token_ids=[1] * 30, max_tokens=9, stop_token_ids=[first_id])
    assert ask(idle_server, prompt_token_ids=[1], max_tokens=4000, deadline_ms=300).finish_reason() == "deadline"
    with pytest.raises(InferenceServerException):
        ask(idle_server, prompt_token_ids=[1], max_tokens=0)
    with grpc_stream(idle_server) as stream:
        stream.send(prompt_token_ids=[1], max_tokens=4000, stream=True)
        stream.next()
        wait_for_metric(idle_server, "num_requests_running", 1)
        assert 1 / 1024 <= read_metrics(idle_server)["gpu_cache_usage_perc"] <= 63 / 1024  # pages are taken as it grows
        stream.cancel()
    wait_until_idle(idle_server)
    after = read_metrics(idle_server)
    change = {name: after[name] - before[name] for name in after if name in before}
    assert change["prompt_tokens_total"] == 10 + 20 + 30 + 30 + 1 + 1
    assert change['request_finish_total{finished_reason="length"}'] == 1 + 3 + 1
    assert change['request_finish_total{finished_reason="stop"}'] == 1
    assert change['request_finish_total{finished_reason="deadline"}'] == 1
    assert change['request_finish_total{finished_reason="cancelled"}'] == 1
    assert change["request_success_total"] == 6
    assert change["request_failure_total"] == 1
    assert change["generation_tokens_total"] == change["request_generation_tokens_sum"] > 5 + 3 * 7 + 1 + 1
    counts = [change[f"{name}_count"] for name in HISTOGRAMS]
    assert counts == [8, 6, 6, 6, 8]  # a sample a sequence, two of which had but one token; a sample a request
    assert change["request_prompt_tokens_sum"] == change["prompt_tokens_total"]
    assert 0.3 < change["e2e_request_latency_seconds_sum"] < 30
    assert 0 < change["time_to_first_token_seconds_sum"] < change["e2e_request_latency_seconds_sum"] * 3
