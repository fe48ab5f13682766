"""The metrics port: the names that dashboards ask for, and values that follow a scripted run exactly."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from backend.engine.events import STEP_TIME_BOUNDS_S
from tests.triton.calls import Answer, Reply, ask, grpc_stream
from tests.triton.conftest import StartServer
from tests.triton.live_server import LiveServer, http_get
from tests.triton.metrics import read_metrics, read_settled_metrics, wait_for_metric, wait_until_idle

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


CONSTANT = (
    "num_request_max",
    "nemo_engine_info",
    "nemo_engine_restarts_total",
    "nemo_kv_pages",
    "nemo_kv_page_tokens",
)
GONE_WHEN_IDLE = ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc", "nemo_kv_pages_used")
NUM_PAGES = 1024


class Script:
    """A run of requests one after the other, and what their own answers say it must have added to every metric."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.truth: Counter[str] = Counter()

    def ask(self, model: str = "ensemble", **inputs: Any) -> Answer:
        """A request that ends by itself; every sequence is one of the samples of the histograms."""
        answer = ask(self._server, model, **inputs)
        num_sequences = inputs.get("num_return_sequences", 1)
        lasts = [answer.of(index)[-1] for index in range(num_sequences)]
        for index, last in enumerate(lasts):
            self._count_sequence(answer.finish_reason(index), len(answer.ids(index)), last)
        self._count_responses(answer)
        self._count_request(lasts[-1] if num_sequences == 1 else max(lasts, key=_last_token_ns))
        return answer

    def _count_sequence(self, reason: str, num_outputs: int, last: Reply) -> None:
        truth, value = self.truth, last.value
        truth[f'request_finish_total{{finished_reason="{reason}"}}'] += 1
        truth["generation_tokens_total"] += num_outputs
        self._observe("request_generation_tokens", num_outputs)
        self._observe("nemo_queue_time_seconds", (value("first_scheduled_time_ns") - value("arrival_time_ns")) / 1e9)
        self._observe("time_to_first_token_seconds", (value("first_token_time_ns") - value("arrival_time_ns")) / 1e9)
        if num_outputs > 1:
            decoding_s = (value("last_token_time_ns") - value("first_token_time_ns")) / 1e9
            self._observe("time_per_output_token_seconds", decoding_s / (num_outputs - 1))
        prompt = value("num_input_tokens")
        truth["nemo_prefix_hit_tokens_total"] += value("num_cached_tokens")
        # All full pages but that of the last token are looked up; a token drawn last is not run, but one behind a stop is.
        truth["nemo_prefix_queried_tokens_total"] += (prompt - 1) // 64 * 64
        truth["nemo_step_tokens_total"] += prompt - value("num_cached_tokens") + num_outputs - (reason == "length")

    def _count_responses(self, answer: Answer) -> None:
        self.truth["nemo_responses_total"] += len(answer.replies)
        self.truth["nemo_response_tokens_total"] += sum(len(reply.values("token_ids")) for reply in answer.replies)

    def _count_request(self, last: Reply) -> None:
        self.truth["request_success_total"] += 1
        self.truth["prompt_tokens_total"] += last.value("num_input_tokens")
        self._observe("request_prompt_tokens", last.value("num_input_tokens"))
        self._observe(
            "e2e_request_latency_seconds", (last.value("last_token_time_ns") - last.value("arrival_time_ns")) / 1e9
        )

    def fail(self, cause: str, **inputs: Any) -> None:
        """A request that is answered with an error."""
        with pytest.raises(InferenceServerException):
            ask(self._server, **inputs)
        self.truth["request_failure_total"] += 1
        self.truth[f'nemo_request_failures_total{{cause="{cause}"}}'] += 1

    def _observe(self, name: str, value: float) -> None:
        self.truth[f"{name}_count"] += 1
        self.truth[f"{name}_sum"] += value  # type: ignore[assignment]


def _last_token_ns(reply: Reply) -> int:
    return int(reply.value("last_token_time_ns"))


def engine_samples(samples: dict[str, float]) -> dict[str, float]:
    """Those of the engine, without Triton's own."""
    return {name: value for name, value in samples.items() if not name.startswith("nv_")}


def test_every_value_follows_a_scripted_run(start_server: StartServer) -> None:
    server = start_server()  # of its own, so that nothing else is counted
    before = engine_samples(read_metrics(server))
    run = Script(server)
    salt = {"cache_salt": "metrics"}
    prompt = [1, *range(1300, 1500)]
    run.ask(prompt_token_ids=[1] * 10, max_tokens=5)
    run.ask(prompt_token_ids=prompt, max_tokens=70, stream=True, **salt)
    assert run.ask(prompt_token_ids=prompt, max_tokens=3, **salt).replies[-1].value("num_cached_tokens") == 192
    run.ask(prompt_token_ids=prompt, max_tokens=7, stream=True, num_return_sequences=3, temperature=1.0, seed=1, **salt)
    first_id = run.ask("mistral_nemo", prompt_token_ids=[1] * 30, max_tokens=1).ids()[0]
    assert run.ask(prompt_token_ids=[1] * 30, max_tokens=9, stop_token_ids=[first_id]).finish_reason() == "stop"
    run.fail("RequestError", prompt_token_ids=[1], max_tokens=0)
    # Published ten times a second, counters first: requests as short as these may never have been seen running.
    for name in ("request_success_total", "request_failure_total", "request_generation_tokens_count"):
        wait_for_metric(server, name, before.get(name, 0.0) + run.truth[name])
    after = engine_samples(read_settled_metrics(server))
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    truth = run.truth
    histograms = {name.removesuffix("_count") for name in truth if name.endswith("_count")}
    assert histograms == {*HISTOGRAMS, "nemo_queue_time_seconds"}

    seen = set()
    for name, expected in truth.items():
        assert change[name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name
        seen.add(name)
    for histogram in histograms:
        in_buckets = {name: value for name, value in change.items() if name.startswith(f"{histogram}_bucket")}
        assert in_buckets[f'{histogram}_bucket{{le="+Inf"}}'] == truth[f"{histogram}_count"]
        assert list(in_buckets.values()) == sorted(in_buckets.values()), "buckets count all that is at most `le`"
        seen |= set(in_buckets)
    in_prompt_buckets = [change[f'request_prompt_tokens_bucket{{le="{bound}"}}'] for bound in (8, 16, 32, 128, 256)]
    assert in_prompt_buckets == [0, 1, 3, 3, 6]

    # One step for each token that is drawn one after the other, and prompts within one step: 5 + 70 + 3 + 1, and the others.
    assert change["nemo_steps_total"] >= 5 + 70 + 3 + 7 + 1 + 1
    in_steps = {name: value for name, value in change.items() if name.startswith("nemo_step_time_seconds")}
    assert in_steps["nemo_step_time_seconds_count"] == in_steps['nemo_step_time_seconds_bucket{le="+Inf"}']
    assert change["nemo_steps_total"] <= in_steps["nemo_step_time_seconds_count"] <= 2 * change["nemo_steps_total"]
    assert 0 < in_steps["nemo_step_time_seconds_sum"] < 60
    at_most = [in_steps[f'nemo_step_time_seconds_bucket{{le="{bound}"}}'] for bound in (*STEP_TIME_BOUNDS_S, "+Inf")]
    assert at_most == sorted(at_most)
    seen |= {"nemo_steps_total", *in_steps}

    # Full pages of prompts and outputs that are known by name from now on.
    assert after["nemo_kv_pages_cached"] + after["nemo_kv_pages_free"] == NUM_PAGES
    assert change["nemo_kv_pages_cached"] == -change["nemo_kv_pages_free"] == (201 + 69) // 64
    seen |= {"nemo_kv_pages_cached", "nemo_kv_pages_free"}

    for name in set(change) - seen:  # nothing else may have moved
        assert change[name] == 0, name
        plain = name.partition("{")[0]
        assert plain in (*CONSTANT, *GONE_WHEN_IDLE, "nemo_preemptions_total", "nemo_swapped_pages_total") or (
            plain in ("request_finish_total", "nemo_request_failures_total")
        ), f"{name} is compared with nothing"
    server.stop()


def test_endings_from_outside_are_counted(idle_server: LiveServer) -> None:
    before = read_metrics(idle_server)
    assert ask(idle_server, prompt_token_ids=[1], max_tokens=4000, deadline_ms=300).finish_reason() == "deadline"
    with pytest.raises(InferenceServerException, match="deadline_ms"):
        ask(idle_server, prompt_token_ids=[1 + n % 4000 for n in range(4000)], max_tokens=90, deadline_ms=1)
    with grpc_stream(idle_server) as stream:
        stream.send(prompt_token_ids=[1], max_tokens=4000, stream=True)
        stream.next()
        wait_for_metric(idle_server, "num_requests_running", 1)
        during = read_metrics(idle_server)
        assert 1 <= during["nemo_kv_pages_used"] <= 63  # pages are taken as it grows
        assert during["gpu_cache_usage_perc"] == pytest.approx(during["nemo_kv_pages_used"] / NUM_PAGES)
        assert sum(during[f"nemo_kv_pages_{kind}"] for kind in ("used", "cached", "free")) == NUM_PAGES
        stream.cancel()
    wait_until_idle(idle_server)
    after = read_metrics(idle_server)
    change = {name: after[name] - before[name] for name in after if name in before}
    assert change['request_finish_total{finished_reason="deadline"}'] == 1
    assert change['request_finish_total{finished_reason="cancelled"}'] == 1
    assert change['nemo_request_failures_total{cause="DeadlineExceeded"}'] == change["request_failure_total"] == 1
    assert change["request_success_total"] == change["e2e_request_latency_seconds_count"] == 2
    assert change["e2e_request_latency_seconds_sum"] > 0.3


def test_waiting_and_running_are_told_apart(start_server: StartServer) -> None:
    small = start_server(max_num_seqs="1", kv_cache_tokens="4096", max_queued_requests="2")
    assert read_metrics(small)["nemo_kv_pages_free"] == 64, "before the first step too"
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(grpc_stream(small)).send(prompt_token_ids=[1], max_tokens=4000, stream=True)
            running_before = read_metrics(small)["num_requests_running"]
            wait_for_metric(small, "num_requests_running", max(1.0, running_before))
        wait_for_metric(small, "num_requests_waiting", 2)
        assert read_metrics(small)["num_requests_running"] == 1
        with pytest.raises(InferenceServerException, match="the queue is full: 2 requests wait"):
            ask(small, prompt_token_ids=[1], max_tokens=1)
        wait_for_metric(small, 'nemo_request_failures_total{cause="QueueFull"}', 1)
    wait_until_idle(small)
    assert read_metrics(small)["num_request_max"] == 1
    small.stop()
