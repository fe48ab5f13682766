"""A device that computes nothing: ids from a formula, after a latency one chooses. For tests and for measuring the host.

It keeps the contract of a device that runs asynchronously: `launch` returns at once, steps run one after the other,
and a result is there `step_time_s` after the step before it was finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from backend.engine.plan import StepPlan, StepResult
from backend.runner.model_runner import Mask

_NUM_CHARACTERS = 95
Number = TypeVar("Number", int, npt.NDArray[Any])


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
        self._seeds: npt.NDArray[Any] = np.zeros(max_num_seqs, dtype=np.int64)

    def token_at(self, seed: Number, position: Number) -> Number:
        """The id drawn behind `position` (0-based position of the last token that ran); of many, when they are arrays."""
        return self._first_id + 32 + (seed * 31 + position * 7) % _NUM_CHARACTERS

    def launch(self, plan: StepPlan) -> FakeStep:
        """Plan the end of the step behind that of the one before."""
        for row in plan.single_rows:
            if row.slot_start is not None:
                self._seeds[row.slot] = row.slot_start.sampling.seed % _NUM_CHARACTERS
        now_s = time.monotonic()
        if self._free_at_s:
            self.idle_s += max(0.0, now_s - self._free_at_s)
        self._free_at_s = max(self._free_at_s, now_s) + self._step_time_s
        # As `token_at` says, for all at once: the host is measured in front of this device.
        steady = plan.steady
        starts: npt.NDArray[Any] = steady.starts
        ids: list[int] = self.token_at(self._seeds[steady.slots], starts).tolist() if len(steady) else []
        for row in plan.single_rows:
            if row.is_sampled:
                ids.append(self.token_at(int(self._seeds[row.slot]), row.start + row.num_tokens - 1))
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
