"""The machine's clock jumps: nothing is decided by it. Deadlines, the watchdog and all waits follow the monotonic clock."""

from __future__ import annotations

import ast
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.triton.calls import ask
from tests.triton.live_server import PROJECT, LiveServer
from tests.triton.metrics import read_metrics, wait_until_idle
from tests.triton.running import NUM_KINDS, answer, running

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
"""Debian's package libfaketime."""
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "time.localtime", "time.gmtime"}
# Stamps of log lines, of answers (OpenAI's `created`) and of benchmarks.
STAMPS = {
    "backend/server_process.py": 1,
    "client/gateway/service.py": 1,
    "client/gateway/chat_response.py": 1,
    "client/gateway/completion_response.py": 1,
    "kernels/bench.py": 1,
}


def test_the_wall_clock_is_asked_for_stamps_alone() -> None:
    found: Counter[str] = Counter()
    for folder in ("backend", "client", "kernels"):
        for path in (PROJECT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(tuple(WALL_CLOCKS)):
                    found[str(path.relative_to(PROJECT))] += 1
    assert found == STAMPS


@pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="runs in `make faults`")
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_clock_jumps(checkpoint: Path, tmp_path: Path) -> None:
    """Two days on and four days back, under load: the same answers, deadlines that hold, no restart."""
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    server = LiveServer(checkpoint, tmp_path / "server", log_format="json")
    server.environment |= {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    try:
        server.start().wait_until_ready()
        expected = [answer(server, index, 300).ids() for index in range(NUM_KINDS)]
        for jump in ("+2d", "-2d"):
            with running(server, max_tokens=300) as answers:
                clock.write_text(f"{jump}\n")
                assert [each.result(60.0).ids() for each in answers] == expected
            late = ask(server, prompt_token_ids=[1], max_tokens=4000, ignore_eos=True, deadline_ms=300)
            assert late.finish_reason() == "deadline"
            assert len(late.ids()) > 0
        wait_until_idle(server)
        assert read_metrics(server)["nemo_engine_restarts_total"] == 0
        server.stop()
        dates = {json.loads(line)["time"][:10] for line in server.log().splitlines()}
        assert len(dates) == 3, f"the clock of the server did not jump: {dates}"
    finally:
        server.kill_everything()
