"""The metrics port, read as Prometheus does."""

from __future__ import annotations

from tests.triton.live_server import LiveServer, http_get, wait_until

_GAUGES = ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc")


def read_metrics(server: LiveServer) -> dict[str, float]:
    """Every sample by its name with labels, as it stands in the text."""
    status, body = http_get(server.metrics_port, "/metrics")
    assert status == 200, body
    lines = [line for line in body.decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def wait_for_metric(server: LiveServer, name: str, least: float, timeout_s: float = 30.0) -> None:
    """Return once a sample is at least `least`."""
    wait_until(lambda: read_metrics(server)[name] >= least, timeout_s, lambda: f"{name}: {read_metrics(server)[name]}")


def wait_until_idle(server: LiveServer, timeout_s: float = 30.0) -> None:
    """Nothing runs, nothing waits, and every page is back in the pool."""

    def busy() -> dict[str, float]:
        metrics = read_metrics(server)
        return {name: metrics[name] for name in _GAUGES if metrics[name]}

    wait_until(lambda: not busy(), timeout_s, lambda: f"not idle: {busy()}")
