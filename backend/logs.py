"""One log format for all processes, text or JSON; lines go to standard error, which the server and the supervisor pass on.

A JSON line has `time` (UTC), `level`, `logger`, `message`, and the fields given as `extra={"fields": {...}}`: the OpenAI
gateway's lines look the same, so that one `request_id` finds all lines of a request.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
LOGGER_NAME = "nemo"

# Triton's lines: severity, date, time, thread, place, message (`I1125 03:34:11.123456 42 server.cc:12] "text"`).
_TRITON_LINE = re.compile(r'([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.-]+:\d+)\] "?(.*?)"?$', re.DOTALL)
_TRITON_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _line(record.created, record.levelname.lower(), record.name, record.getMessage(), fields)


def start_logging(level: str, log_format: str = "text") -> None:
    """Send this process's `nemo.*` lines from `level` on to standard error; called once a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def as_json(line: bytes, now_s: float) -> bytes:
    r"""A line of the server's output as JSON, unless it is already: what Triton and its libraries write is wrapped.

    >>> line = json.loads(as_json(b'W1125 03:34:11.1 42 model.cc:7] "no GPU"\n', 0.0))
    >>> line["level"], line["logger"], line["message"], line["place"]
    ('warning', 'tritonserver', 'no GPU', 'model.cc:7')
    """
    if line.startswith(b"{") or not line.strip():
        return line if line.strip() else b""
    text = line.decode("utf-8", "replace").rstrip("\n")
    found = _TRITON_LINE.match(text)
    if found is None:
        return _line(now_s, "info", "tritonserver", text, {}).encode() + b"\n"
    severity, place, message = found.groups()
    return _line(now_s, _TRITON_LEVELS[severity], "tritonserver", message, {"place": place}).encode() + b"\n"


def _line(time_s: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    time = datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")
    return json.dumps(
        {"time": time, "level": level, "logger": logger, "message": message} | fields, ensure_ascii=False, default=str
    )
