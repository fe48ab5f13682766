"""Text and JSON lines, and Triton's own lines as JSON."""

from __future__ import annotations

import json
import logging

import pytest

from backend.logs import as_json, start_logging


def test_a_json_line_has_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("info", "json")
    logging.getLogger("nemo.request").info("it's %r", "ü\n", extra={"fields": {"request_id": "r-1", "num": 3}})
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("+00:00")
    expected = {"level": "info", "logger": "nemo.request", "message": "it's 'ü\\n'", "request_id": "r-1", "num": 3}
    assert line == expected


def test_an_exception_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("info", "json")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("nemo.x").exception("failed")
    (text,) = capsys.readouterr().err.splitlines()
    assert "ValueError: no" in json.loads(text)["exception"]


def test_text_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging("info")
    logging.getLogger("nemo.x").info("hello", extra={"fields": {"request_id": "r"}})
    assert capsys.readouterr().err.endswith(" I nemo.x: hello\n")


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (b'E1125 03:34:11.123456 42 model_lifecycle.cc:642] "failed to load"\n', "error", "failed to load"),
        (b"I1125 03:34:11.123456 42 http_server.cc:9] Started\n", "info", "Started"),
        (b"Traceback (most recent call last):\n", "info", "Traceback (most recent call last):"),
        (b"\xff\xfe odd bytes\n", "info", "\ufffd\ufffd odd bytes"),
    ],
)
def test_lines_of_the_server_are_wrapped(line: bytes, level: str, message: str) -> None:
    made = json.loads(as_json(line, 1.0))
    assert (made["level"], made["logger"], made["message"]) == (level, "tritonserver", message)


def test_lines_that_are_json_pass_and_empty_ones_go() -> None:
    assert as_json(b'{"a": 1}\n', 1.0) == b'{"a": 1}\n'
    assert as_json(b"\n", 1.0) == b""
