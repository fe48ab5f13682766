"""A device that only sleeps, and writes down how long it waited before each step and what the loop's thread computed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from backend.engine.plan import StepPlan
from backend.runner.fake_runner import FakeRunner, FakeStep


class PacedRunner(FakeRunner):
    """FakeRunner with a diary; `step_time_s` a step."""

    def __init__(self, *, num_pages: int, max_num_seqs: int, step_time_s: float) -> None:
        super().__init__(num_pages=num_pages, max_num_seqs=max_num_seqs, step_time_s=step_time_s)
        self._gaps_s: list[float] = []
        self._launched_s: list[float] = []
        self._cpu_s: list[float] = []

    def launch(self, plan: StepPlan) -> FakeStep:
        """Launch, and write down."""
        idle_s = self.idle_s
        step = super().launch(plan)
        self._gaps_s.append(self.idle_s - idle_s)
        self._launched_s.append(time.monotonic())
        self._cpu_s.append(time.thread_time())
        return step

    def summary(self, num_skipped: int) -> dict[str, float]:
        """Of all steps but the first `num_skipped` and the last: what the device waited, and what the loop's thread computed.

        `idle_percent` of the time, `gap_percent` of the steps that came too late, by how much (ms), and processor time
        a step (ms), which leaves out sleeping.
        """
        gaps_ms = [1000 * gap_s for gap_s in self._gaps_s[num_skipped + 1 : -1]]
        first, last, num_steps = num_skipped, len(self._gaps_s) - 2, len(gaps_ms)
        wall_ms = 1000 * (self._launched_s[last] - self._launched_s[first])
        cpu_ms = 1000 * (self._cpu_s[last] - self._cpu_s[first])
        return {
            "steps": num_steps,
            "step_ms": round(wall_ms / num_steps, 3),
            "idle_percent": round(100 * sum(gaps_ms) / wall_ms, 3),
            "gap_percent": round(100 * sum(gap_ms > 0 for gap_ms in gaps_ms) / num_steps, 3),
            "gap_p50_ms": round(quantile(gaps_ms, 0.5), 3),
            "gap_p99_ms": round(quantile(gaps_ms, 0.99), 3),
            "gap_max_ms": round(max(gaps_ms), 3),
            "host_ms_per_step": round(cpu_ms / num_steps, 3),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
