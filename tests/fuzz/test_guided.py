"""Parsers under atheris: inputs that reach new code, found by coverage. `make test` runs one of them, shortly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.cases import IS_FULL
from tests.triton.live_server import PROJECT

FILES = ("config.json", "config.json, compressed-tensors", "params.json", "hf_quant_config.json", "tekken.json")
MORE_FILES = ("model.safetensors.index.json", "tokenizer.json", "model.safetensors")
REQUESTS = (
    "messages",
    "tools",
    "ensemble",
    "mistral_nemo",
    "postprocessing",
    "settings",
    "container",
    "gateway settings",
)
NUM_RUNS = 2000 if IS_FULL else 200


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FILES + MORE_FILES + REQUESTS if IS_FULL else ["params.json"])
def test_guided_by_coverage(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz.guided", name, "--folder", str(tmp_path), "--runs", str(NUM_RUNS)]
    command += [] if IS_FULL else ["--seed", "1"]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, errors="replace", timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    (executed,) = re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert int(executed) >= NUM_RUNS
    covered = re.findall(r"cov: (\d+)", done.stderr)
    assert int(covered[-1]) > int(covered[0]), "nothing new was reached: is the project's code instrumented?"
    print(f"{name}: {executed} cases, {covered[0]} places of the code reached at first, {covered[-1]} in the end")
