"""What the processes of a server hold while it serves: memory, open files and threads, sampled, and how fast each grows."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.triton.live_server import LiveServer, command_line

PERIOD_S = 5.0
QUANTITIES = ("rss_mb", "open_files", "threads")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Slope:
    """Growth by least squares, an hour, with the standard error of the estimate."""

    per_hour: float
    error_per_hour: float

    @classmethod
    def of(cls, seconds: Sequence[float], values: Sequence[float]) -> Slope:
        """Of values sampled at these times; flat when there are fewer than three.

        >>> Slope.of([0.0, 1800.0, 3600.0], [10.0, 11.0, 12.0])
        Slope(per_hour=2.0, error_per_hour=0.0)
        """
        count = len(values)
        if count < 3:
            return cls(0.0, 0.0)
        mean_s, mean = sum(seconds) / count, sum(values) / count
        spread = sum((each - mean_s) ** 2 for each in seconds)
        slope = sum((s - mean_s) * (v - mean) for s, v in zip(seconds, values, strict=True)) / spread
        rest = sum((v - mean - slope * (s - mean_s)) ** 2 for s, v in zip(seconds, values, strict=True))
        return cls(3600.0 * slope, 3600.0 * math.sqrt(rest / (count - 2) / spread))


@dataclass
class History:
    """The samples of one process, each at its second since the sampling began."""

    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})

    def add(self, second: float, sample: tuple[float, ...]) -> None:
        """Append one sample."""
        self.seconds.append(round(second, 1))
        for name, value in zip(QUANTITIES, sample, strict=True):
            self.values[name].append(value)

    def slope(self, name: str, since_s: float) -> Slope:
        """How fast a quantity grows from second `since_s` on."""
        chosen = [index for index, second in enumerate(self.seconds) if second >= since_s]
        return Slope.of([self.seconds[index] for index in chosen], [self.values[name][index] for index in chosen])

    def numbers(self, since_s: float) -> dict[str, Any]:
        """For the results file: slopes, and all samples."""
        slopes = {name: self.slope(name, since_s) for name in QUANTITIES}
        return {
            **{f"{name}_per_hour": round(slope.per_hour, 2) for name, slope in slopes.items()},
            **{f"{name}_per_hour_error": round(slope.error_per_hour, 2) for name, slope in slopes.items()},
            "seconds": self.seconds,
            **self.values,
        }


class UsageSampler:
    """Samples every process of a server in a thread of its own, from entering the context to leaving it."""

    def __init__(self, server: LiveServer, period_s: float = PERIOD_S) -> None:
        self._server = server
        self._period_s = period_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage-sampler")
        self.histories: dict[str, History] = {}

    def __enter__(self) -> UsageSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        started_s = time.monotonic()
        while not self._is_over.wait(self._period_s):
            for pid in self._server.pids():
                sample = sample_process(pid)
                if sample is not None:
                    name = process_name(pid, self._server)
                    self.histories.setdefault(name, History()).add(time.monotonic() - started_s, sample)


def sample_process(pid: int) -> tuple[float, ...] | None:
    """Resident memory in MB, open files, threads; None for a process that is gone."""
    process = Path(f"/proc/{pid}")
    try:
        pages = int((process / "statm").read_text().split()[1])
        return (
            round(pages * _PAGE_BYTES / 1e6, 2),
            len(os.listdir(process / "fd")),
            len(os.listdir(process / "task")),
        )
    except OSError:
        return None


def process_name(pid: int, server: LiveServer) -> str:
    """What a process of the server is; a model with several stubs has them told apart by their process ids."""
    line = command_line(pid)
    if line.split(" ")[0].endswith("bin/tritonserver"):
        return "tritonserver"
    if found := re.search(r"/model_repository/(\w+)/", line):
        return f"{found[1]}, stub {pid}"
    modules = {"backend.serve": "supervisor", "backend.engine.process": "engine", "client.gateway": "gateway"}
    module = next((each for each in modules if f"-m {each}" in line), "")
    return modules.get(module) or ("guide checker" if "guide_checker" in line else f"process {pid}")
