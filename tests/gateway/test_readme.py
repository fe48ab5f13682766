"""The examples of the gateway's README, run as they stand but for the port."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from client.gateway.tables import README
from tests.gateway.test_openai_package import ANSWER
from tests.triton.live_server import PROJECT, LiveServer

EXAMPLES: list[str] = re.findall(r"```(?:bash|python)\n.*?```", README.read_text(), re.DOTALL)
PRINTED = (f'"content":"{ANSWER}"', ANSWER, 'get_weather {"city": ')


def run(example: str, live: LiveServer) -> str:
    """What an example prints; it must end well."""
    language, _, code = example.strip("`").partition("\n")
    code = code.replace("localhost:9000", f"127.0.0.1:{live.openai_port}")
    command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3
    assert Path(README).name == "README.md"


@pytest.mark.parametrize(("example", "printed"), list(zip(EXAMPLES, PRINTED, strict=True)))
def test_examples_of_the_readme(live: LiveServer, example: str, printed: str) -> None:
    output = run(example, live)
    assert printed in output
    if "curl" in example:
        assert "data: [DONE]" in output
        assert '"tokens":[1,' in output
