"""A device that runs nothing and keeps what it was asked to launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.launch import Graph, Launch, Mark, PassedMark, RecordedGraph


class FakeDevice:
    def __init__(self, torch_device: str = "cpu") -> None:
        self.torch_device = torch.device(torch_device)
        self.num_sms = 132
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch)

    def synchronize(self) -> None:
        pass

    def mark(self) -> Mark:
        return PassedMark()

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, record: Callable[[], None]) -> Graph:
        before, self.launches = self.launches, []
        record()
        captured, self.launches = self.launches, before
        return RecordedGraph(self, captured)
