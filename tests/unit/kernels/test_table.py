"""The kernel table in kernels/README.md is the one that the code gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.__main__ import main
from kernels.cubin_cache import CubinCache
from kernels.ops import OPS, select_ops
from kernels.table import (
    HARDWARE_RUNS,
    TABLE_BEGIN,
    TABLE_END,
    kernel_table,
    read_hardware_runs,
    write_table,
    written_table,
)

# Shared with tests/kernels/test_gates.py; ignored by git, removed by `make clean`.
BUILD_FOLDER = Path(__file__).resolve().parents[3] / "build" / "kernels"


@pytest.mark.timeout(600)
def test_readme_has_the_current_table() -> None:
    assert written_table() == kernel_table(OPS, CubinCache(BUILD_FOLDER)), "run python -m kernels list --write"


def test_table_is_written_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{TABLE_BEGIN}\nold\n{TABLE_END}\nafter\n")
    for table in ("a\nb", "c"):
        write_table(table, readme)
        assert readme.read_text() == f"before\n{TABLE_BEGIN}\n\n{table}\n\n{TABLE_END}\nafter\n"
        assert written_table(readme) == table


def test_run_on_hardware_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"read_bandwidth": {"date": "2027-01-02T03:04:05+00:00", "gpu": "NVIDIA H200", "commit": "abc123"}}
    monkeypatch.setattr("kernels.table.read_hardware_runs", lambda: runs)
    row = kernel_table(select_ops("read_bandwidth"), CubinCache(BUILD_FOLDER)).splitlines()[-1]
    assert row.endswith("| 2027-01-02, NVIDIA H200, abc123 |")
    assert row.startswith(
        "| read_bandwidth | 1 GiB (N 268435456, B 264) | `read_bandwidth` | 264 x 512 | 1.07 GB | 250 us |"
    )


def test_hardware_runs_are_of_operations_that_exist() -> None:
    assert json.loads(HARDWARE_RUNS.read_text()).keys() <= {op.name for op in OPS}
    assert all({"date", "gpu", "commit"} <= run.keys() for run in read_hardware_runs().values())


def test_commands_refuse_what_they_cannot_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["check", "rmsnorm"]) == 1
    assert main(["bench"]) == 1
    assert main(["check", "rms"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[:2] == ["kernels: no GPU: torch sees none on this machine"] * 2
    assert errors[2].startswith("kernels: no operation 'rms', expected one of scatter, ")
