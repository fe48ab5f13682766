"""A real Prometheus scrapes a live server under load: every panel and every rule has data; the log finds a request by its id."""

from __future__ import annotations

import json
import math
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.prometheus import PROMETHEUS, Prometheus, running_prometheus
from tests.deploy.promql import metric_names, panel_queries, rules
from tests.triton.calls import post
from tests.triton.live_server import LiveServer, http_get, wait_until
from tests.triton.running import PROMPT

NO_GPU = "nv_gpu_"
needs_prometheus = pytest.mark.skipif(not PROMETHEUS.exists(), reason="no prometheus in .venv/tools: run `make tools`")


def chat(server: LiveServer, request_id: str, **more: Any) -> dict[str, Any]:
    """One chat through the gateway."""
    body = {"model": "mistral-nemo", "messages": [{"role": "user", "content": "secret words"}], "max_tokens": 8} | more
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.openai_port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-Request-Id": request_id},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        made: dict[str, Any] = json.load(answer)
    return made


@contextmanager
def under_load(server: LiveServer) -> Iterator[None]:
    """Requests of all kinds until the end of the block."""
    is_over = threading.Event()

    def work(number: int) -> None:
        while not is_over.is_set():
            if number == 0:
                chat(server, "load")
            elif number == 1:
                post(server, "ensemble/generate", PROMPT | {"max_tokens": 0})  # refused
            else:
                post(server, "ensemble/generate", {"prompt_token_ids": [1, *range(1500, 1700)], "max_tokens": 20})
            is_over.wait(0.05)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def has_data(prometheus: Prometheus, query: str) -> bool:
    samples = prometheus.query(query)
    return bool(samples) and all(not math.isnan(float(sample["value"][1])) for sample in samples)


@needs_prometheus
def test_every_query_returns_data(monitored: LiveServer, tmp_path: Path) -> None:
    panels = panel_queries()
    without_gpu = {name for name, query in panels.items() if NO_GPU in query}
    assert {name.rpartition(" ")[0] for name in without_gpu} == {"GPU utilisation", "GPU memory", "GPU power"}
    wanted = {name: query for name, query in panels.items() if name not in without_gpu} | rules("record")
    wanted |= {f"{alert} reads {name}": name for alert, text in rules("alert").items() for name in metric_names(text)}
    with running_prometheus(monitored, tmp_path) as prometheus, under_load(monitored):

        def empty() -> list[str]:
            return [f"{name}: {query}" for name, query in wanted.items() if not has_data(prometheus, query)]

        wait_until(lambda: not empty(), 90.0, lambda: f"without data: {empty()}")
        groups = prometheus.get("rules")["groups"]
        broken = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"]
        assert broken == []
        firing = {
            each["labels"]["alertname"] for each in prometheus.get("alerts")["alerts"] if each["state"] == "firing"
        }
        assert firing == set()
        answered = prometheus.query('sum(request_success_total{job="mistral-nemo"})')
        assert float(answered[0]["value"][1]) > 0


def log_lines(server: LiveServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log().splitlines()]


def test_every_line_of_the_log_is_json(monitored: LiveServer) -> None:
    lines = log_lines(monitored)
    assert {"nemo.serve", "gateway"} <= {line["logger"] for line in lines}
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)


def test_a_request_is_found_by_its_id_in_gateway_and_models(monitored: LiveServer) -> None:
    chat(monitored, "find-me-1")

    def loggers() -> set[str]:
        return {line["logger"] for line in log_lines(monitored) if line.get("request_id") == "find-me-1"}

    wait_until(lambda: {"gateway", "nemo.request"} <= loggers(), 10.0, lambda: str(loggers()))
    (line,) = [
        each
        for each in log_lines(monitored)
        if each.get("request_id") == "find-me-1" and each["logger"] == "nemo.request"
    ]
    assert (line["finish_reason"], line["num_output_tokens"]) == ("length", 8)


def test_what_clients_write_is_not_in_the_log(monitored: LiveServer) -> None:
    chat(monitored, "private-1")
    status, _ = post(
        monitored, "ensemble/generate", {"text_input": "secret words", "max_tokens": -1, "id": "private-2"}
    )
    assert status == 400
    wait_until(lambda: "private-1" in monitored.log(), 10.0, "not logged")
    assert "secret words" not in monitored.log()


def test_a_refused_request_is_logged_with_its_field(monitored: LiveServer) -> None:
    post(monitored, "ensemble/generate", PROMPT | {"max_tokens": -1, "id": "bad-1"})
    wait_until(
        lambda: any(
            line.get("field") == "max_tokens" and line.get("request_id") == "bad-1" for line in log_lines(monitored)
        ),
        10.0,
        monitored.log,
    )


def test_both_metrics_pages_are_what_prometheus_reads(monitored: LiveServer) -> None:
    for port, path in ((monitored.metrics_port, "/metrics"), (monitored.openai_port, "/v1/metrics")):
        status, body = http_get(port, path)
        assert status == 200
        assert b"num_requests_waiting" in body
