"""`make test-gpu` without a GPU: what it says, and that its own tests work, on the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.marks import needs_emulator
from tests.gpu.__main__ import passed_ops, read_results, table

ROOT = Path(__file__).resolve().parents[3]


def run_suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    finished = run_suite()
    assert finished.returncode == 1
    assert (finished.stdout, finished.stderr) == ("", "test-gpu: no GPU: torch sees none on this machine\n")


@pytest.mark.timeout(600)
@needs_emulator
def test_its_tests_run_on_the_emulator(tmp_path: Path) -> None:
    chosen = "read_bandwidth or (launches and (overlap or graph)) or vector_access or (long_context and bf16)"
    finished = run_suite("--emulated", "--logs", str(tmp_path), "--", "-k", chosen)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = {line.split()[0]: line.split()[1:4] for line in finished.stdout.splitlines() if line}
    assert lines["launches_on_gpu"] == ["2", "0", "0"]
    assert lines["read_bandwidth"] == ["3", "0", "0"]
    assert lines["long_context_on_gpu"] == ["3", "0", "0"]
    assert finished.stdout.splitlines()[-1].endswith(f"full logs in {tmp_path}")
    # A case that was skipped is no run of the operation.
    assert json.loads((tmp_path / "hardware_runs.json").read_text()) == {}
    assert "PASSED tests/gpu/test_launches_on_gpu.py" in (tmp_path / "pytest.log").read_text()


def junit(classname: str, name: str, seconds: float, inside: str = "", **properties: str) -> str:
    """A test in pytest's report."""
    items = "".join(f'<property name="{key}" value="{value}"/>' for key, value in properties.items())
    head = f'<testcase classname="{classname}" name="{name}" time="{seconds}">'
    return f"{head}<properties>{items}</properties>{inside}</testcase>"


def test_results_of_a_run_become_a_table_and_a_record(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    ops, launches = "tests.gpu.test_ops_on_gpu", "tests.gpu.test_launches_on_gpu"
    passed = junit(ops, "test_case[b]", 0.5, op="read_bandwidth")
    cases = [
        junit(ops, "test_case[a]", 1.5, op="read_bandwidth", error_share="0.250", differs="sums"),
        *(passed, passed, passed),
        junit(launches, "test_graph", 2, '<failure message="other bits&#10;more"/>'),
        junit(launches, "test_stream", 0, "<skipped/>"),
    ]
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    results = read_results(report)
    rows = [line.split() for line in table(results)[1:]]
    assert rows[0] == ["read_bandwidth", "4", "0", "0", "3.0", "0.250", "sums"]
    assert rows[1] == ["launches_on_gpu", "0", "1", "1", "2.0"]
    assert table(results)[3:] == ["FAILED test_graph: other bits"]
    machine: dict[str, Any] = {"date": "2027-01-01", "gpu": "H200", "commit": "abc", "torch": "2"}
    run = {"date": "2027-01-01", "gpu": "H200", "commit": "abc"}
    assert passed_ops(results, machine) == {"read_bandwidth": run}
    results[1]["outcome"] = "failed"
    assert passed_ops(results, machine) == {}
