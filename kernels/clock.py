"""Microseconds that work on a GPU takes, with a cold L2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from kernels.launch import Device
from kernels.read_bandwidth import read_bandwidth

NUM_WARM_UP = 5
NUM_SAMPLES = 50
# Read between samples: several times the 50 MB of L2, and long enough to hide the host's work for the next sample.
FLUSH_BYTES = 512 << 20


class Clock(Protocol):
    """Times what a function starts."""

    def samples_us(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Of each run, by its name; the runs take turns, so that whatever drifts meets them all alike."""


class GpuClock:
    """Between two events on the current stream, after other memory was read through L2.

    A run must not wait for the host: a replay of a graph.
    """

    def __init__(self, device: Device, num_samples: int = NUM_SAMPLES, flush_bytes: int = FLUSH_BYTES) -> None:
        memory = torch.zeros(flush_bytes // 4, dtype=torch.int32, device=device.torch_device)
        sums = torch.empty(2 * device.num_sms, dtype=torch.int32, device=device.torch_device)
        # Reading leaves nothing that must be written back while a sample runs.
        self._flush = device.capture(lambda: read_bandwidth(device, data=memory, sums=sums)).replay
        self._device = device
        self._num_samples = num_samples

    def samples_us(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Of each run, by its name; the runs take turns."""
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for _ in range(NUM_WARM_UP + self._num_samples):
            for name, run in runs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flush()
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        self._device.synchronize()
        return {
            name: [1000 * start.elapsed_time(end) for start, end in pairs[NUM_WARM_UP:]]
            for name, pairs in events.items()
        }
