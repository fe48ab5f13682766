"""The few calls of Triton's HTTP API that the supervisor needs."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterable
from typing import Any

from backend.errors import ConfigError, EngineFailure
from backend.exposure import ADMIN_HEADER

_LOAD_TIMEOUT_S = 3600.0
_ASK_TIMEOUT_S = 5.0
_ENGINE_REQUESTS = re.compile(rb"^num_requests_(?:running|waiting)(?:{.*})? (\S+)$", re.MULTILINE)


class ServerApi:
    """Talks to the tritonserver on this machine. A call that gets no answer raises OSError."""

    def __init__(self, http_port: int, metrics_port: int, admin_secret: str) -> None:
        self._port = http_port
        self._headers = {ADMIN_HEADER: admin_secret}
        self._metrics_port = metrics_port

    def is_live(self) -> bool:
        """Whether the server answers at all."""
        try:
            return self._call("GET", "/v2/health/live")[0] == 200
        except OSError:
            return False

    def is_ready(self, model: str) -> bool:
        """Whether requests to `model` are served (`/v2/health/ready` says 200 before anything was asked to load)."""
        try:
            return self._call("GET", f"/v2/models/{model}/ready")[0] == 200
        except OSError:
            return False

    def load(self, model: str) -> None:
        """Load a model and wait for it; ConfigError with the model's own words when it refuses."""
        status, body = self._call("POST", f"/v2/repository/models/{model}/load", {}, timeout_s=_LOAD_TIMEOUT_S)
        if status != 200:
            raise ConfigError(_reason(body))

    def unload(self, model: str) -> None:
        """Ask to unload a model: it is unready at once, and what runs goes on to its end."""
        status, body = self._call("POST", f"/v2/repository/models/{model}/unload", {}, timeout_s=_LOAD_TIMEOUT_S)
        if status != 200:
            raise EngineFailure(_reason(body))

    def has_begun_to_load(self, model: str) -> bool:
        """Whether the server has taken up the load of a model."""
        return self._states().get(model) in ("LOADING", "READY")

    def are_unloaded(self, models: Iterable[str]) -> bool:
        """Whether nothing of these models runs any more (while one is unloading, its running streams go on)."""
        states = self._states()
        return all(states.get(model) not in ("READY", "UNLOADING") for model in models)

    def _states(self) -> dict[str, str]:
        status, body = self._call("POST", "/v2/repository/index", {})
        if status != 200:
            raise EngineFailure(_reason(body))
        return {entry["name"]: entry.get("state", "") for entry in json.loads(body)}

    def num_executions(self) -> int:
        """How often any model was executed since the server started."""
        status, body = self._call("GET", "/v2/models/stats")
        if status != 200:
            raise EngineFailure(_reason(body))
        return sum(model.get("execution_count", 0) for model in json.loads(body)["model_stats"])

    def num_engine_requests(self) -> int:
        """Requests that run or wait at the engine; 0 when it is unloaded."""
        status, body = self._call("GET", "/metrics", port=self._metrics_port)
        if status != 200:
            raise EngineFailure(f"the metrics port answered {status}")
        return sum(int(float(value)) for value in _ENGINE_REQUESTS.findall(body))

    def check_tensors(self) -> None:
        """Send known ids through `preprocessing` and compare: a stub with the wrong NumPy reads numbers wrong without a word."""
        ids = [1, 1031, 70_000, 2**31 - 1]
        tensor = {"name": "prompt_token_ids", "shape": [1, len(ids)], "datatype": "INT32", "data": ids}
        status, body = self._call("POST", "/v2/models/preprocessing/infer", {"inputs": [tensor]})
        returned = json.loads(body)["outputs"][0]["data"] if status == 200 else _reason(body)
        if returned != ids:
            raise ConfigError(
                f"the server's Python stub does not pass tensors on unchanged: sent {ids}, got {returned}; "
                "server 2.51 needs NumPy 1.26 in the environment (run `make clean serve`)"
            )

    def _call(
        self,
        method: str,
        path: str,
        content: dict[str, Any] | None = None,
        *,
        port: int | None = None,
        timeout_s: float = _ASK_TIMEOUT_S,
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self._port, timeout=timeout_s)
        try:
            connection.request(method, path, None if content is None else json.dumps(content), self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()


def _reason(body: bytes) -> str:
    """What went wrong, out of Triton's wrapping: `load failed ...: Internal: ConfigError: <reason>\\n\\nAt:\\n <traceback>`."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace").strip() or "no reason given"
    found = re.search(r"(?:ConfigError|EngineFailure): (.*?)(?:\n\nAt:|$)", message, re.DOTALL)
    return (found[1] if found else message).strip()
