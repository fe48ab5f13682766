"""The gateway's own metrics, and the page on which they stand together with the engine's."""

from __future__ import annotations

import asyncio
import http.client
import re

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from client.gateway.record import Record

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMEOUT_S = 2.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_INFO = re.compile(r"^nemo_engine_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """What the gateway counts; paths that do not exist count as `other`, so that nobody can make up labels."""

    def __init__(self, paths: frozenset[str], triton_metrics: str) -> None:
        self._paths = paths
        self._triton_metrics = triton_metrics
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "nemo_gateway_requests",
            "Requests answered, by path and HTTP status",
            ("path", "status"),
            registry=self._registry,
        )
        self.num_running = Gauge(
            "nemo_gateway_requests_in_progress", "Requests that are being answered", registry=self._registry
        )
        self._disconnects = Counter(
            "nemo_gateway_disconnects", "Clients that went away before their answer was over", registry=self._registry
        )
        self._duration = Histogram(
            "nemo_gateway_request_duration_seconds",
            "From the head of a request to the end of its answer, in seconds",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "nemo_gateway_time_to_first_token_seconds",
            "From the head of a streamed request to its first chunk, in seconds",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._is_engine_up = Gauge(
            "nemo_gateway_engine_metrics_up", "Whether the engine's metrics could be read", registry=self._registry
        )

    def observe(self, record: Record, duration_s: float) -> None:
        """Count a request that is over."""
        path = record.path if record.path in self._paths else "other"
        self._requests.labels(path, record.status).inc()
        self._duration.labels(path).observe(duration_s)
        if record.first_token_s is not None:
            self._first_token.labels(path).observe(record.first_token_s)
        if record.is_disconnected:
            self._disconnects.inc()

    async def page(self) -> bytes:
        """Triton's page (with the engine's metrics) and the gateway's behind it, in Prometheus' text format."""
        engine = await self.engine_page()
        self._is_engine_up.set(engine is not None)
        return (engine or b"") + generate_latest(self._registry)

    async def engine_page(self) -> bytes | None:
        """Triton's page, None while it cannot be read."""
        return await asyncio.to_thread(self._read_engine_page)

    async def engine_info(self) -> dict[str, str]:
        """What the engine says of itself in the labels of `nemo_engine_info`; empty while it is not there."""
        page = await self.engine_page()
        found = _INFO.search((page or b"").decode())
        return {name: value.replace('\\"', '"') for name, value in _LABEL.findall(found[1])} if found else {}

    def _read_engine_page(self) -> bytes | None:
        connection = http.client.HTTPConnection(self._triton_metrics, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            return response.read() if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
