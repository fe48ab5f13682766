"""Where the seconds of a start-up go: phases that follow one another, for one line of the log at its end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


class Phases:
    """Seconds by phase, in the order of their ends. What happened since the last end belongs to the phase that ends now.

    What runs beside a phase has none of its own: it is seen as far as something waits for it.
    """

    def __init__(self, began_s: float | None = None) -> None:
        """`began_s`: of the first phase, on the monotonic clock; None: now."""
        self._began_s = self._last_s = time.monotonic() if began_s is None else began_s
        self._seconds: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        """From the beginning to the last end."""
        return self._last_s - self._began_s

    def end(self, name: str) -> None:
        """The phase `name` ends now; one that has ended before gets the seconds in addition."""
        now_s = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def line(self) -> str:
        """For people, in seconds: `3.2 s: imports 1.4, weights 1.8`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        return f"{self.total_s:.1f} s: {parts}"

    def fields(self) -> dict[str, Any]:
        """For a line of a JSON log: `total_s`, and `phases_s` by name, to the millisecond."""
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        return {"fields": {"total_s": round(self.total_s, 3), "phases_s": seconds}}


def process_began_s() -> float:
    """When this process was started, on the monotonic clock, to 10 ms: what Python itself and the imports took counts."""
    # proc_pid_stat(5): field 22, in clock ticks since the machine was booted; the name in field 2 may hold spaces.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
