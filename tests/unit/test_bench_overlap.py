"""The benchmarks of the host beside a device: the steps they say are counted, and what the device waited is what it waited."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from backend.engine.plan import StepPlan
from backend.runner import fake_runner
from tests.bench import paced_runner
from tests.bench.bench_overlap import Loop, run_process
from tests.bench.bench_runner_host import step_times_s
from tests.bench.paced_runner import PacedRunner
from tests.bench.tables import overlap_table

NUM_STEPS = 30


def test_both_ways_take_the_steps_asked_for() -> None:
    cells = [Loop(3, 0.001, NUM_STEPS).run(), run_process(3, 0.001, NUM_STEPS)]
    for cell in cells:
        assert cell["steps"] is not None
        assert cell["steps"] >= NUM_STEPS - 2, "less the last ones, which nothing follows"
        assert cell["host_ms_per_step"]
    shown = [cell | {"sequences": 3, "device_ms": 1.0, "runs": "this"} for cell in cells]
    assert overlap_table({"cells": shown}).count("| 3 | 1 | this |") == 2


def test_what_a_device_waited_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms by a clock of ours. The first two and the last do not count; of four, two come 2 and 8 ms late."""
    launched_ms = [0, 19, 24, 41, 46, 69, 88]
    computed_ms = [0, 50, 53, 56, 59, 62, 99]
    now_s = cpu_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s, thread_time=lambda: cpu_s)
    for module in (fake_runner, paced_runner):
        monkeypatch.setattr(module, "time", clock)
    runner = PacedRunner(num_pages=1, max_num_seqs=1, step_time_s=0.01)
    for step, (launched, computed) in enumerate(zip(launched_ms, computed_ms, strict=True)):
        now_s, cpu_s = 100 + launched / 1000, computed / 1000
        runner.launch(StepPlan(step, single_rows=()))
    assert runner.summary(1) == {
        "steps": 4,
        "step_ms": 12.5,
        "idle_percent": 20.0,
        "gap_percent": 50.0,
        "gap_p50_ms": 0.0,
        "gap_p99_ms": 8.0,
        "gap_max_ms": 8.0,
        "host_ms_per_step": 3.0,
    }


def test_the_cuda_runner_gives_its_results_on_a_device_that_computes_nothing() -> None:
    """A step whose logits the device does not call finite would raise."""
    assert len(step_times_s(2, 5, None)) == 5
