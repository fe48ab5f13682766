"""One launch of a kernel, and the interfaces it goes through: `Device` (runs it), `Graph` (runs many again), `Mark` (waits).

Two back ends implement them: `kernels.driver.CudaDevice`, and the emulator of the tests, which runs the same sources on
the CPU. A launcher (`kernels/<op>.py`) gets one of them as its first argument and does not know which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.arguments import Argument
from kernels.program import Program as Program

MAX_THREADS_PER_BLOCK = 1024
# A cluster of more blocks needs a kernel that asks for the non-portable size; no kernel here does.
MAX_CLUSTER_BLOCKS = 8
# What a thread block of compute capability 9.0 can have, static part included.
MAX_SHARED_BYTES = 227 * 1024
# CUDA's bounds of the grid in x, y, z.
MAX_GRID = (2**31 - 1, 65535, 65535)

Dim3 = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Launch:
    """What is launched: `kernel` (its `extern "C"` name) of a program, on which grid, with which arguments.

    `grid`, `block` and `cluster` count in x, y, z: blocks, threads, blocks. `shared_bytes` is dynamic shared memory.
    `overlaps_previous` is programmatic dependent launch: the kernel may start before the one launched before it has
    ended, and must call `griddep_wait` before it touches anything that is not CONSTANT.
    """

    program: Program
    kernel: str
    grid: Dim3
    block: Dim3
    arguments: tuple[Argument, ...]
    cluster: Dim3 = (1, 1, 1)
    shared_bytes: int = 0
    overlaps_previous: bool = False

    def __post_init__(self) -> None:
        for name, sizes, bounds in (
            ("grid", self.grid, MAX_GRID),
            ("block", self.block, (MAX_THREADS_PER_BLOCK, MAX_THREADS_PER_BLOCK, 64)),
            ("cluster", self.cluster, (MAX_CLUSTER_BLOCKS,) * 3),
        ):
            for axis, size, bound in zip("xyz", sizes, bounds, strict=True):
                if not 1 <= size <= bound:
                    raise ValueError(f"{self.kernel}: {name}.{axis} is {size}, expected 1 to {bound}")
        for name, sizes, bound in (
            ("block", self.block, MAX_THREADS_PER_BLOCK),
            ("cluster", self.cluster, MAX_CLUSTER_BLOCKS),
        ):
            if (product := sizes[0] * sizes[1] * sizes[2]) > bound:
                raise ValueError(f"{self.kernel}: {name} {sizes} has {product} members, expected at most {bound}")
        if any(blocks % together for blocks, together in zip(self.grid, self.cluster, strict=True)):
            raise ValueError(f"{self.kernel}: grid {self.grid} is no multiple of cluster {self.cluster}")
        if not 0 <= self.shared_bytes <= MAX_SHARED_BYTES:
            raise ValueError(f"{self.kernel}: shared_bytes is {self.shared_bytes}, expected 0 to {MAX_SHARED_BYTES}")


class Graph(Protocol):
    """Launches captured by `Device.capture`, to be run again with the same tensors at the same addresses."""

    def replay(self) -> None:
        """Runs all of them once more, in order; returns before they have ended."""


class Mark(Protocol):
    """A place among the launches of a device."""

    def wait(self) -> None:
        """Waits for what was launched before it, and not for what came after. LaunchError if any of it failed."""


class Device(Protocol):
    """Where kernels run. Launches go to torch's current stream, in order, and return before the kernel has ended."""

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of a launch must lie."""

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors, for launchers that size a grid by them."""

    def launch(self, launch: Launch) -> None:
        """Starts a kernel. BuildError, LaunchError."""

    def synchronize(self) -> None:
        """Waits for everything launched. LaunchError with the report of the last launches if any of it failed."""

    def mark(self) -> Mark:
        """Marks what has been launched on the current stream so far."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed memory of the host that the device copies from and to by itself, so that nobody waits for the copy."""

    def capture(self, record: Callable[[], None]) -> Graph:
        """Calls `record`, whose launches are kept instead of run, and gives them as a graph.

        Only launches on this device may be in it: what torch computes there is part of a CUDA graph but not of an
        emulated one.
        """


class PassedMark:
    """A mark of a device that has always done everything it was told."""

    def wait(self) -> None:
        """There is nothing to wait for."""


class RecordedGraph:
    """A graph that is a list of launches, for a device that has nothing better."""

    def __init__(self, device: Device, launches: list[Launch]) -> None:
        self._device = device
        self._launches = tuple(launches)

    def replay(self) -> None:
        """Launches all of them once more, in order."""
        for launch in self._launches:
            self._device.launch(launch)
