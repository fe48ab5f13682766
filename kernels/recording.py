"""A device that starts nothing: which launches, and so which programs, an operation comes to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.launch import Graph, Launch, Mark, PassedMark, RecordedGraph
from kernels.op import Case, Op

# Of an H200 and an H100 SXM.
NUM_SMS = 132


class RecordingDevice:
    """Keeps the launches instead of running them."""

    def __init__(self, torch_device: str = "cpu") -> None:
        """`torch_device` meta: tensors have sizes and no memory."""
        self.torch_device = torch.device(torch_device)
        self.num_sms = NUM_SMS
        self.launches: list[Launch] = []

    def launch(self, launch: Launch) -> None:
        """Keeps it."""
        self.launches.append(launch)

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def mark(self) -> Mark:
        """Nothing is ever under way."""
        return PassedMark()

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Nothing is ever copied by the device."""
        return torch.zeros(shape, dtype=dtype)

    def capture(self, record: Callable[[], None]) -> Graph:
        """A graph that records its launches again at every replay."""
        before, self.launches = self.launches, []
        try:
            record()
            return RecordedGraph(self, self.launches)
        finally:
            self.launches = before


def recorded_launches(op: Op, case: Case) -> list[Launch]:
    """What the launcher launches for a case on an H200."""
    device = RecordingDevice()
    op.launch(device, **op.make_inputs(case, 0))
    return device.launches
