"""A device that remembers what went through another one, replays of graphs included."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kernels.launch import Device, Graph, Launch, Mark
from tests.bench.gpu.timeline import Span, label


class ObservedDevice:
    """`launches` and, where `is_timed` (a device that returns from a launch when it is over), `spans` since the last `forget`."""

    def __init__(self, device: Device, *, is_timed: bool) -> None:
        self.launches: list[Launch] = []
        self.spans: list[Span] = []
        self._device = device
        self._is_timed = is_timed

    @property
    def torch_device(self) -> torch.device:
        return self._device.torch_device

    @property
    def num_sms(self) -> int:
        return self._device.num_sms

    def forget(self) -> None:
        self.launches, self.spans = [], []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)
        started = time.perf_counter()
        self._device.launch(launch)
        if self._is_timed:
            self.spans.append(Span(label(launch), 1e6 * started, 1e6 * time.perf_counter()))

    def synchronize(self) -> None:
        self._device.synchronize()

    def mark(self) -> Mark:
        return self._device.mark()

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return self._device.pinned(*shape, dtype=dtype)

    def capture(self, record: Callable[[], None]) -> Graph:
        before = self.launches, self.spans
        self.forget()
        try:
            graph = self._device.capture(record)
            return _ObservedGraph(self, graph, self.launches)
        finally:
            self.launches, self.spans = before


class _ObservedGraph:
    def __init__(self, device: ObservedDevice, graph: Graph, launches: list[Launch]) -> None:
        self._device = device
        self._graph = graph
        self._launches = launches

    def replay(self) -> None:
        if self._device._is_timed:
            for launch in self._launches:
                self._device.launch(launch)
        else:
            self._device.launches += self._launches
            self._graph.replay()
