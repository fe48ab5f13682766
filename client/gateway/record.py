"""What is remembered of a request while it runs: for its log line and for the metrics."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(given: str | None) -> str:
    """The client's X-Request-Id if it is fit for a header and a log, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


@dataclass
class Record:
    """One request; handlers fill in what they learn."""

    request_id: str
    method: str
    path: str
    started_s: float = field(default_factory=time.monotonic)
    status: int = 0
    is_disconnected: bool = False
    first_token_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def on_first_token(self) -> None:
        """The first chunk is there."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_s

    def log_fields(self) -> Mapping[str, Any]:
        """What the log line says."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration_ms": round((time.monotonic() - self.started_s) * 1e3, 1),
        }
        if self.first_token_s is not None:
            fields["first_token_ms"] = round(self.first_token_s * 1e3, 1)
        if self.is_disconnected:
            fields["disconnected"] = True
        return fields | self.details
