"""python -m tests.gpu --logs folder: everything that needs a GPU, with a short table last (`make test-gpu`).

Needs python 3.11 or newer with torch, cuda-bindings, numpy, pytest and NVRTC; no network, no nvcc. g++ with CUDA's headers adds
the comparison with the emulator, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from kernels.bench import describe_machine
from kernels.build import build
from kernels.driver import CudaDevice
from kernels.errors import KernelError
from kernels.ops import OPS
from tests.gpu.emulation import why_not_emulated
from tests.kernels.units import ALL

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Runs the tests that need a Hopper GPU.")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "test-gpu", help="folder for the full logs")
    parser.add_argument("--emulated", action="store_true", help="on the emulator, to test the tests")
    parser.add_argument("pytest_arguments", nargs="*", help="passed on to pytest, after --")
    options = parser.parse_args()
    machine: dict[str, Any] = {"gpu": "the emulator", "commit": "", "date": ""}
    if not options.emulated:
        try:
            machine = describe_machine(CudaDevice())
            build([*(program for op in OPS for program in op.programs), *(unit.program for unit in ALL)])
        except KernelError as error:
            print(f"test-gpu: {error}", file=sys.stderr)
            return 1
    options.logs.mkdir(parents=True, exist_ok=True)
    (options.logs / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    started = time.monotonic()
    status = run_pytest(options.logs, [*(["--emulated"] if options.emulated else []), *options.pytest_arguments])
    report = options.logs / "junit.xml"
    if not report.is_file():
        print(f"test-gpu: pytest did not run, see {options.logs}/pytest.log", file=sys.stderr)
        return status or 1
    results = read_results(report)
    (options.logs / "hardware_runs.json").write_text(json.dumps(passed_ops(results, machine), indent=2) + "\n")
    print("\n".join(table(results)))
    if (reason := why_not_emulated()) is not None:
        print(f"not compared with the emulator: {reason}")
    print(
        f"{machine['gpu']}, torch {torch.__version__}, {time.monotonic() - started:.0f} s; full logs in {options.logs}"
    )
    return status


def run_pytest(logs: Path, arguments: list[str]) -> int:
    """Its output goes into pytest.log, its results into junit.xml; a line of dots shows that it goes on."""
    (logs / "junit.xml").unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", "-c", str(Path(__file__).with_name("suite.ini")), "--rootdir", str(ROOT)),
        # Not the conftest.py of all tests, which needs more than a GPU machine has.
        *(
            "--confcutdir",
            str(Path(__file__).parent),
            str(Path(__file__).parent),
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
        ),
        *(
            "--junitxml",
            str(logs / "junit.xml"),
            "-o",
            "junit_family=xunit1",
            "-o",
            "console_output_style=count",
            "-rA",
        ),
        *arguments,
    ]
    with (logs / "pytest.log").open("w") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        while True:
            try:
                return process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                print(f"test-gpu: {count_finished(logs / 'pytest.log')} tests done", file=sys.stderr, flush=True)


def count_finished(log: Path) -> int:
    """Letters on pytest's lines of progress so far."""
    return sum(
        sum(letter in ".FsE" for letter in line.split(" ", 1)[1])
        for line in log.read_text(errors="replace").splitlines()
        if line.startswith("tests/gpu/") and " " in line
    )


def read_results(report: Path) -> list[dict[str, str]]:
    """A test per entry: group, name, outcome, seconds, first line of its failure, and the properties it recorded."""
    results = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failures = [*case.findall("failure"), *case.findall("error")]
        outcome = "failed" if failures else "skipped" if case.find("skipped") is not None else "passed"
        properties = {item.attrib["name"]: item.attrib["value"] for item in case.iter("property")}
        group = properties.get("op", case.attrib["classname"].rsplit(".", 1)[-1].removeprefix("test_"))
        message = failures[0].attrib.get("message", "").partition("\n")[0] if failures else ""
        results.append(
            {
                "group": group,
                "name": case.attrib["name"],
                "outcome": outcome,
                "seconds": case.attrib["time"],
                "message": message,
                **properties,
            }
        )
    return results


def table(results: list[dict[str, str]]) -> list[str]:
    """A line for every group, and one for every failure."""
    remarks = "largest error / bound, other bits than the emulator"
    lines = [f"{'group':<28} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>8}  {remarks}"]
    for group in dict.fromkeys(result["group"] for result in results):
        of_group = [result for result in results if result["group"] == group]
        count = Counter(result["outcome"] for result in of_group)
        seconds = sum(float(result["seconds"]) for result in of_group)
        shares = [result["error_share"] for result in of_group if "error_share" in result]
        differing = sorted({name for result in of_group for name in result.get("differs", "").split()})
        remark = f"{max(shares)} {', '.join(differing) or 'none'}" if shares else ""
        lines.append(
            f"{group:<28} {count['passed']:>6} {count['failed']:>6} {count['skipped']:>7} {seconds:>8.1f}  {remark}".rstrip()
        )
    return lines + [
        f"FAILED {result['name']}: {result['message'][:160]}" for result in results if result["outcome"] == "failed"
    ]


def passed_ops(results: list[dict[str, str]], machine: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What goes into kernels/hardware_runs.json: operations of which every case was run and passed."""
    run = {key: machine[key] for key in ("date", "gpu", "commit")}
    outcomes = {op.name: Counter(result["outcome"] for result in results if result.get("op") == op.name) for op in OPS}
    return {op.name: run for op in OPS if outcomes[op.name] == {"passed": len(op.cases)}}


if __name__ == "__main__":
    sys.exit(main())
