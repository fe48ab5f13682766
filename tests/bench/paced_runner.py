"""A device that only sleeps, and writes down how long it waited before each step and what the loop's thread computed."""

from __future__ import annotations

import time

from backend.engine.plan import StepPlan
from backend.runner.fake_runner import FakeRunner, FakeStep
from client.load_report import percentile_ms


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

    def summary(self, num_skipped: int) -> dict[str, float | None]:
        """Of all steps but the first `num_skipped` and the last: what the device waited, and what the loop's thread computed.

        `idle_percent` of the time, `gap_percent` of the steps that came too late, by how much (ms), and processor time
        a step (ms), which leaves out sleeping.
        """
        gaps_s = self._gaps_s[num_skipped + 1 : -1]
        first, last, num_steps = num_skipped, len(self._gaps_s) - 2, len(gaps_s)
        wall_s, cpu_s = (times_s[last] - times_s[first] for times_s in (self._launched_s, self._cpu_s))
        return {
            "steps": num_steps,
            "step_ms": round(1000 * wall_s / num_steps, 3),
            "idle_percent": round(100 * sum(gaps_s) / wall_s, 3),
            "gap_percent": round(100 * sum(gap_s > 0 for gap_s in gaps_s) / num_steps, 3),
            "gap_p50_ms": percentile_ms(gaps_s, 50),
            "gap_p99_ms": percentile_ms(gaps_s, 99),
            "gap_max_ms": percentile_ms(gaps_s, 100),
            "host_ms_per_step": round(1000 * cpu_s / num_steps, 3),
        }
