"""The machine's clock may jump: nothing is decided by it. Deadlines, the watchdog and all waits follow the monotonic clock."""

from __future__ import annotations

import ast
from collections import Counter

from tests.triton.live_server import PROJECT

WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime", "time.gmtime")
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
                if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(WALL_CLOCKS):
                    found[str(path.relative_to(PROJECT))] += 1
                assert not (isinstance(node, ast.ImportFrom) and node.module == "time"), (
                    f"{path}: name the clock in full"
                )
    assert found == STAMPS
