"""A clock for the emulator: it shows that a benchmark works, and its times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

_NUM_SAMPLES = 2


class HostClock:
    """Wall time of runs that are over when they return."""

    def samples_us(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(_NUM_SAMPLES):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                samples[name].append(1e6 * (time.perf_counter() - started))
        return samples
