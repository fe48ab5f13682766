"""The table of a decode step's kernels is the one that the runner's launches give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.plan import NEMO_12B as NEMO
from tests.bench.gpu import launch_table
from tests.bench.gpu.floor import decode_bytes
from tests.bench.gpu.models import FP8
from tests.bench.gpu.steps import Cell


def test_readme_has_the_current_table() -> None:
    written = launch_table.written_table()
    assert written == launch_table.launch_table(), "run python -m tests.bench.gpu.launch_table --write"


@pytest.mark.parametrize("cell", launch_table.CELLS, ids=str)
def test_every_kernel_of_a_step_may_start_before_the_last_one_has_ended(cell: Cell) -> None:
    step = launch_table.captured_step(cell)
    launches = (*step.before, *step.of_layer, *step.after)
    assert [launch.kernel for launch in launches if not launch.overlaps_previous] == []
    assert step.num_launches(NEMO.num_layers) == 407
    # What the table counts is what the bench takes as the floor, and activations and logits: more of them in a larger batch.
    costs = [launch_table.launch_cost(launch, cell) for launch in launches]
    weights = [40 if launch in step.of_layer else 1 for launch in launches]
    num_bytes = sum(weight * cost.bytes for weight, cost in zip(weights, costs, strict=True) if cost is not None)
    floor = decode_bytes(NEMO, FP8, 1, cell.batch, cell.context)
    assert floor < num_bytes < floor * (1 + 0.0012 * cell.batch)


def test_times_that_were_measured_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"batch": 1, "context": 1024, "exposed_us": {"rmsnorm": 12.34, "skinny_gemm 6144x5120": 400.0}}
    (tmp_path / "gpu.json").write_text(json.dumps({"decode_steps": [measured]}))
    monkeypatch.setattr(launch_table, "RESULTS", tmp_path)
    table = launch_table.launch_table(launch_table.CELLS[:1]).splitlines()
    assert next(line for line in table if "6144x5120" in line).endswith("| 400.0 in the step |")
    assert next(line for line in table if "swiglu" in line).endswith("| 0.0 in the step |")
