"""Pins host memory piece by piece beside serving: pinning is slow (the kernel clears every page of it), and may be late.

Copies from and to memory that is not pinned yet are right, too; they only hold up the host.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

log = logging.getLogger("nemo.engine")
_PIECE_BYTES = 64 << 20
"""Of one call of the driver, which holds up others meanwhile."""


class Pinner(Protocol):
    """What pins memory; RuntimeError when it cannot."""

    def pin(self, address: int, num_bytes: int) -> None:
        """Pin memory that is not pinned yet."""

    def unpin(self, address: int) -> None:
        """Undo the `pin` of this address."""


class CudaPinner:
    """By the CUDA runtime, for `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pin(self, address: int, num_bytes: int) -> None:
        """RuntimeError with CUDA's words."""
        with torch.cuda.device(self._device):
            _check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))

    def unpin(self, address: int) -> None:
        """RuntimeError with CUDA's words."""
        with torch.cuda.device(self._device):
            _check(torch.cuda.cudart().cudaHostUnregister(address))


def _check(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(torch.cuda.cudart().cudaGetErrorString(status))


def pinnable(num_bytes: int) -> torch.Tensor:
    """Memory [num_bytes] UINT8 that begins with a page of the operating system, which commits it when it is first used."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Pinning:
    """Pins `memory`, each of it `pinnable`, in a thread of its own, from construction until all is pinned or `close`.

    A copy must not be part pinned and part not, nor lie in two pieces: none may cross a multiple of `unit_bytes`.
    """

    def __init__(self, memory: Sequence[torch.Tensor], unit_bytes: int, pinner: Pinner) -> None:
        self._memory = tuple(memory)  # must not be freed while it is pinned
        self._pinner = pinner
        self._pinned: list[int] = []
        self._is_closing = threading.Event()
        self._pieces = [piece for part in memory for piece in _pieces(part, unit_bytes)]
        self._thread = threading.Thread(target=self._run, name="pinning", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the thread has ended."""
        self._thread.join()

    def close(self) -> None:
        """End the thread and unpin everything, so that the memory can be freed."""
        self._is_closing.set()
        self._thread.join()
        while self._pinned:
            self._pinner.unpin(self._pinned.pop())

    def _run(self) -> None:
        began_s, num_bytes = time.monotonic(), sum(size for _, size in self._pieces)
        for address, size in self._pieces:
            if self._is_closing.is_set():
                return
            try:
                self._pinner.pin(address, size)
            except RuntimeError as error:
                share = f"{len(self._pinned)} of {len(self._pieces)} pieces"
                log.warning(
                    "host pages: only %s could be pinned, copies of the others hold up the host: %s", share, error
                )
                return
            self._pinned.append(address)
        log.info("host pages: %.1f GB pinned beside serving in %.1f s", num_bytes / 1e9, time.monotonic() - began_s)


def _pieces(memory: torch.Tensor, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """Addresses and sizes that cover the memory; none but the last ends within a unit, or within a page of the system."""
    unit = math.lcm(unit_bytes, mmap.PAGESIZE)
    size = max(1, _PIECE_BYTES // unit) * unit
    for first in range(0, memory.nbytes, size):
        yield memory.data_ptr() + first, min(size, memory.nbytes - first)
