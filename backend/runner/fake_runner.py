"""A device that computes nothing: ids from a formula, after a latency one chooses. For tests and for measuring the host.

It keeps the contract of a device that runs asynchronously: `launch` returns at once, steps run one after the other,
and a result is there `step_time_s` after the step before it was finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from backend.engine.plan import StepPlan, StepResult
from backend.runner.model_runner import Mask


class FakeStep:
    """A step that is finished at `ready_at_s` of the monotonic clock; drawing costs nothing."""

    def __init__(self, ready_at_s: float, step_result: StepResult) -> None:
        self._ready_at_s = ready_at_s
        self._step_result = step_result

    def draw(self, masks: Mapping[int, Mask]) -> None:
        """Guides are refused by this runner: nothing is masked."""
        assert not masks, "the fake runner knows no grammar"

    def result(self) -> StepResult:
        """Sleep until the step is finished."""
        delay_s = self._ready_at_s - time.monotonic()
        if delay_s > 0:
            time.sleep(delay_s)
        return self._step_result


class FakeRunner:
    """Draws printable one-byte ids that depend on the sequence's seed and the position alone.

    `first_id` is the id of the byte 0x00 (Tekken: 1000); ids walk through the 95 printable characters. `idle_s` is how long
    the device waited for a next step.
    """

    caches_outputs = True

    def __init__(
        self,
        *,
        num_pages: int,
        max_num_seqs: int,
        num_host_pages: int = 0,
        step_time_s: float = 0.0,
        first_id: int = 1000,
    ) -> None:
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.max_num_seqs = max_num_seqs
        self._step_time_s = step_time_s
        self._first_id = first_id
        self._free_at_s = 0.0
        self.idle_s = 0.0
        self._seeds = [0] * max_num_seqs

    def token_at(self, seed: int, position: int) -> int:
        """The id drawn behind `position` (0-based position of the last token that ran)."""
        return self._first_id + 32 + (seed * 31 + position * 7) % 95

    def launch(self, plan: StepPlan) -> FakeStep:
        """Plan the end of the step behind that of the one before."""
        for row in plan.rows:
            if row.slot_start is not None:
                self._seeds[row.slot] = row.slot_start.sampling.seed
        now_s = time.monotonic()
        if self._free_at_s:
            self.idle_s += max(0.0, now_s - self._free_at_s)
        self._free_at_s = max(self._free_at_s, now_s) + self._step_time_s
        seeds, first_id = self._seeds, self._first_id + 32
        # As `token_at` says, in one expression: the host is measured in front of this device.
        ids = [
            first_id + (seeds[row.slot] * 31 + (row.start + row.num_tokens - 1) * 7) % 95
            for row in plan.rows
            if row.is_sampled
        ]
        return FakeStep(self._free_at_s, StepResult(tuple(ids)))

    def describe(self) -> dict[str, str]:
        """What runs here."""
        return {
            "runner": "fake",
            "device": "none",
            "reason": "asked for by the setting runner",
            "batch_invariant": "yes",
        }

    def close(self) -> None:
        """Nothing to free."""
