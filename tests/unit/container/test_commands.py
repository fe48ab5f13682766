"""The commands as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.unit.container.test_checks import SIZES


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NIM_", "NEMO_"))}
    command = [sys.executable, "-m", "backend.container", *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60, check=False)


def test_unknown_command() -> None:
    done = run("train")
    assert done.returncode == 2
    assert "no such command: train; there are: serve, check, plan, download, bench, ask, health" in done.stderr


def test_plan_answers_for_the_model_without_a_gpu() -> None:
    done = run("plan", "--gpu-memory", "80GB", "--weights", "fp8", "--kv", "fp8")
    assert done.returncode == 0
    assert "kv_cache" in done.stdout


def test_serve_refuses_everything_at_once_and_says_how_to_mend_it() -> None:
    done = run("serve", NIM_MODEL_PATH="/models/missing", REQUIRE_GPU="1", NIM_JSONL_LOGGING="1", PATH="/nowhere")
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    errors = [line for line in lines if line["level"] == "error"]
    assert [line["check"] for line in errors] == ["gpu", "checkpoint"]
    assert "docker run --gpus all" in errors[0]["message"]
    assert "download hf://mistralai/Mistral-Nemo-Instruct-2407" in errors[1]["message"]


def test_check_of_a_good_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "good", **SIZES)
    done = run("check", NIM_MODEL_PATH=str(folder))
    assert done.returncode == 0, done.stderr
    assert "1 layers" in done.stderr


def test_variables_that_are_not_understood() -> None:
    done = run("serve", NIM_TENSOR_PARALLEL_SIZE="4")
    assert done.returncode == 1
    assert "NIM_TENSOR_PARALLEL_SIZE: is not understood" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_and_ask_are_the_client_s_commands() -> None:
    assert "--streams" in run("bench", "--help").stdout
    assert "--protocol" in run("ask", "--help").stdout
