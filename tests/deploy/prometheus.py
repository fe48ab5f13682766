"""A real Prometheus that scrapes a live server with the configuration of docker/prometheus, on loopback."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.helm import PROJECT, TOOLS
from tests.deploy.promql import RULES
from tests.triton.live_server import LiveServer, free_ports, http_get, wait_until

PROMETHEUS, PROMTOOL = TOOLS / "prometheus", TOOLS / "promtool"
CONFIGURATION = PROJECT / "docker" / "prometheus" / "prometheus.yaml"


class Prometheus:
    """One that runs."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> Any:
        """The data of an API call."""
        status, body = http_get(self.port, f"/api/v1/{path}", timeout_s=30.0)
        if status == 503:
            raise ConnectionError("it is still starting")
        answer = json.loads(body)
        assert status == 200, answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        samples: list[dict[str, Any]] = self.get(f"query?query={urllib.parse.quote(expression)}")["result"]
        return samples


def configuration(server: LiveServer) -> dict[str, Any]:
    """That of docker/prometheus with this server's ports, and faster."""
    made: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    made["global"] = {"scrape_interval": "1s", "evaluation_interval": "2s"}
    made["rule_files"] = [str(RULES)]
    ports = {"server:8002": server.metrics_port, "server:9000": server.openai_port}
    for job in made["scrape_configs"]:
        for each in job["static_configs"]:
            each["targets"] = [f"127.0.0.1:{ports[target]}" for target in each["targets"]]
    return made


@contextmanager
def running_prometheus(server: LiveServer, folder: Path) -> Iterator[Prometheus]:
    """Scrape `server` until the end of the block."""
    (port,) = free_ports(1)
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(configuration(server)))
    command = [str(PROMETHEUS), f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    prometheus = Prometheus(port)

    def are_all_up() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            targets = prometheus.get("targets")["activeTargets"]
        except OSError:
            return False
        return len(targets) == 2 and all(target["health"] == "up" for target in targets)

    try:
        wait_until(are_all_up, 60.0, "the targets are not up")
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=30)
