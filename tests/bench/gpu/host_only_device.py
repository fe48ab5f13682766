"""A device that computes nothing: what remains of a step is what the host does for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from kernels.arguments import Buffer
from kernels.launch import Graph, Launch
from kernels.recording import RecordingDevice


class HostOnlyDevice(RecordingDevice):
    """Keeps what it is asked for: `graphs` as lists of launches, `replays` of them by number, `pinned_memory`, `waits` for marks.

    `torch_device` cpu: copies are made, as fast as memory is. meta: tensors of the device have sizes and no memory, so that
    whatever would read one on the host fails. `results`: what kernels leave in buffers of these names.
    """

    def __init__(self, torch_device: str = "cpu", results: Mapping[str, float] | None = None) -> None:
        super().__init__(torch_device)
        self._results = results or {}
        self.graphs: list[tuple[Launch, ...]] = []
        self.replays: list[int] = []
        self.pinned_memory: list[torch.Tensor] = []
        self.num_marks = 0
        self.waits: list[int] = []

    def launch(self, launch: Launch) -> None:
        super().launch(launch)
        for argument in launch.arguments:
            if isinstance(argument, Buffer) and argument.tensor is not None and argument.name in self._results:
                with torch.inference_mode():
                    argument.tensor.fill_(self._results[argument.name])

    def synchronize(self) -> None:
        raise AssertionError("the host waits for everything")

    def mark(self) -> NumberedMark:
        self.num_marks += 1
        return NumberedMark(self, self.num_marks - 1)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.pinned_memory.append(torch.zeros(shape, dtype=dtype))
        return self.pinned_memory[-1]

    def capture(self, record: Callable[[], None]) -> Graph:
        before, self.launches = self.launches, []
        record()
        self.graphs.append(tuple(self.launches))
        self.launches = before
        return NumberedGraph(self, len(self.graphs) - 1)


class NumberedMark:
    def __init__(self, device: HostOnlyDevice, number: int) -> None:
        self._device = device
        self._number = number

    def wait(self) -> None:
        self._device.waits.append(self._number)


class NumberedGraph:
    def __init__(self, device: HostOnlyDevice, number: int) -> None:
        self._device = device
        self._number = number

    def replay(self) -> None:
        self._device.replays.append(self._number)
