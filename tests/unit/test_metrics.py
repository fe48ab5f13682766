"""What the engine counts becomes the metrics it is published as: every number, each time by what it has grown."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from backend.engine import messages
from backend.engine.events import STEP_TIME_BOUNDS_S, EngineStats
from backend.errors import Cancelled, DeadlineExceeded, EngineFailure, QueueFull, RequestError
from tests.triton_stub import MetricFamily, triton_stub


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, over a Triton that only counts."""
    with triton_stub():
        module = importlib.import_module("backend.triton_adapter.metrics")
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=iter(range(1, 1000)).__next__))
        yield module


def value(name: str, labels: str = "") -> float:
    return MetricFamily.made[name][labels].value


def stats_of(factor: int) -> EngineStats:
    """Every number another one; a later moment has a larger factor."""
    names = [name for name in EngineStats.__struct_fields__ if name != "step_time_counts"]
    numbers: dict[str, Any] = {name: factor * (10 + place) for place, name in enumerate(names)}
    numbers |= {"num_pages": 1000, "step_time_s": factor * 0.5}
    counts = tuple(factor * (1 + place) for place in range(len(STEP_TIME_BOUNDS_S) + 1))
    return EngineStats(**numbers, step_time_counts=counts)


def test_stats_become_gauges_and_counters(metrics: Any) -> None:
    made = metrics.Metrics()
    for factor in (1, 1, 3):
        stats = stats_of(factor)
        made.observe_step(messages.Step((), (), stats))
        made.publish()
        gauges = {
            "num_requests_running": stats.num_requests_running,
            "num_requests_waiting": stats.num_requests_waiting,
            "gpu_cache_usage_perc": stats.num_pages_held / 1000,
            "nemo_kv_pages_used": stats.num_pages_held,
            "nemo_kv_pages_cached": stats.num_pages_cached,
            "nemo_kv_pages_free": 1000 - stats.num_pages_held - stats.num_pages_cached,
        }
        assert {name: value(name) for name in gauges} == gauges
        counters = {
            "nemo_steps_total": stats.num_steps,
            "nemo_step_tokens_total": stats.num_planned_tokens,
            "nemo_prefix_queried_tokens_total": stats.num_prefix_queried_tokens,
            "nemo_prefix_hit_tokens_total": stats.num_prefix_hit_tokens,
            "nemo_preemptions_total": stats.num_preempted_sequences,
            "nemo_swapped_pages_total": stats.num_swapped_pages,
            "nemo_step_time_seconds_sum": stats.step_time_s,
            "nemo_step_time_seconds_count": sum(stats.step_time_counts),
        }
        assert {name: value(name) for name in counters} == counters
        at_most = [value("nemo_step_time_seconds_bucket", f"le={bound}") for bound in (*STEP_TIME_BOUNDS_S, "+Inf")]
        assert at_most == [sum(stats.step_time_counts[: place + 1]) for place in range(len(at_most))]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RequestError("top_p", "bad"), "RequestError"),
        (QueueFull("full"), "QueueFull"),
        (DeadlineExceeded("late"), "DeadlineExceeded"),
        (Cancelled("gone"), "Cancelled"),
        (EngineFailure("dead"), "EngineFailure"),
        (KeyError("a bug"), "Internal"),
    ],
)
def test_failures_are_counted_by_cause(metrics: Any, error: Exception, cause: str) -> None:
    made = metrics.Metrics()
    made.observe_failures(error)
    made.observe_failures(error, 3)
    assert value("nemo_request_failures_total", f"cause={cause}") == 0, "published with the next tick"
    made.publish()
    assert value("nemo_request_failures_total", f"cause={cause}") == 4
    assert value("request_failure_total") == 4


def test_bounds_and_restarts_are_published_at_once(metrics: Any) -> None:
    made = metrics.Metrics()
    made.set_bounds(256, 1024)
    made.set_num_restarts(2)
    assert (value("num_request_max"), value("nemo_kv_pages_free"), value("nemo_engine_restarts_total")) == (
        256,
        1024,
        2,
    )
