"""`make test-gpu` without a GPU: what it says, and that its own tests work, on the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.emulator.toolchain import why_unavailable
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
@pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")
def test_its_tests_run_on_the_emulator(tmp_path: Path) -> None:
    chosen = "read_bandwidth or (launches and (overlap or graph)) or vector_access"
    finished = run_suite("--emulated", "--logs", str(tmp_path), "--", "-k", chosen)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = {line.split()[0]: line.split()[1:4] for line in finished.stdout.splitlines() if line}
    assert lines["launches_on_gpu"] == ["2", "0", "0"]
    assert lines["read_bandwidth"] == ["3", "0", "0"]
    assert finished.stdout.splitlines()[-1].endswith(f"full logs in {tmp_path}")
    # A case that was skipped is no run of the operation.
    assert json.loads((tmp_path / "hardware_runs.json").read_text()) == {}
    assert "PASSED tests/gpu/test_launches_on_gpu.py" in (tmp_path / "pytest.log").read_text()


def test_results_of_a_run_become_a_table_and_a_record(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.gpu.test_ops_on_gpu" name="test_case[a]" time="1.5"><properties>'
        '<property name="op" value="read_bandwidth"/><property name="error_share" value="0.250"/>'
        '<property name="differs" value="sums"/></properties></testcase>'
        + 3
        * '<testcase classname="t.test_ops_on_gpu" name="test_case[b]" time="0.5"><properties><property name="op" value='
        '"read_bandwidth"/></properties></testcase>'
        + '<testcase classname="tests.gpu.test_launches_on_gpu" name="test_graph" time="2">'
        '<failure message="other bits&#10;more"/></testcase><testcase classname="tests.gpu.test_launches_on_gpu" name="test_stream" time="0">'
        "<skipped/></testcase>"
        "</testsuite></testsuites>"
    )
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
