"""Requests drawn from the served OpenAPI document, right and wrong ones: none may be answered with a 5xx.

`make test-fuzz` draws for ten minutes; here it is a bounded, repeatable sample.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.live_server import LiveServer

SECONDS = int(os.environ.get("FUZZ_SECONDS", "12"))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))


@pytest.mark.timeout(SECONDS + 180)
def test_no_request_is_answered_with_a_server_error(live: LiveServer, base_url: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{base_url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    command += ["--max-time", str(SECONDS), "--request-timeout", "60", "--suppress-health-check", "all", "--no-color"]
    command += ["--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS + 150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 selected / 12 total" in done.stdout, done.stdout
    assert live.is_ready()
    print(done.stdout[-600:])
