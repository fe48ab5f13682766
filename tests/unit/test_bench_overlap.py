"""The benchmark of the loop's overlap counts the steps it says, of the loop alone and of the engine's process."""

from __future__ import annotations

from tests.bench.bench_overlap import Loop, run_process
from tests.bench.paced_runner import quantile
from tests.bench.tables import overlap_table

NUM_STEPS = 30


def test_both_ways_take_the_steps_asked_for_and_their_numbers_fit_together() -> None:
    cells = [Loop(3, 0.001, NUM_STEPS).run(), run_process(3, 0.001, NUM_STEPS)]
    for cell in cells:
        assert cell["steps"] >= NUM_STEPS - 2, "less the last ones, which nothing follows"
        assert 0 <= cell["gap_p50_ms"] <= cell["gap_p99_ms"] <= cell["gap_max_ms"]
        assert cell["host_ms_per_step"] > 0
    shown = [cell | {"sequences": 3, "device_ms": 1.0, "runs": "this"} for cell in cells]
    assert overlap_table({"cells": shown}).count("| 3 | 1 | this |") == 2


def test_a_quantile_is_one_of_the_values() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1.0, 1.0, 2.0, 3.0, 4.0]
