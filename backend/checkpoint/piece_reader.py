"""Reads source tensors ahead, in pieces of whole rows: threads fill a few staging buffers while the loader converts.

One thread copies out of the page cache at a fraction of what a GPU takes in, and a disk wants several reads at once. On a
GPU the buffers are pinned, so that a copy to the device runs beside the reads of the next pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint.tensor_files import REMEDY, StoredTensor
from backend.errors import ConfigError

PIECE_BYTES = 16 * 2**20
"""A piece is at most as large, unless a single step of rows is larger."""
NUM_THREADS = 4
NUM_BUFFERS = 2 * NUM_THREADS
"""So host memory holds 128 MiB of source at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first_row` and following of `tensor`, on the device. `rows` is valid until the next piece is asked for."""

    tensor: StoredTensor
    first_row: int
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a piece lies in its file."""

    tensor: StoredTensor
    first_row: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class _Buffer:
    """Staging for one piece; when the device copies from it, it is free again when that copy is done."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, file_descriptor: int, extent: _Extent) -> None:
        """Read the piece; ConfigError when the file cannot be read, or is shorter than its header says."""
        target = self._bytes.numpy().data[: extent.num_bytes]
        offset = extent.offset
        while target:
            try:
                num_read = os.preadv(file_descriptor, [target], offset)
            except OSError as error:
                raise ConfigError(f"{extent.tensor.path} cannot be read: {error.strerror}") from error
            if num_read == 0:
                raise ConfigError(f"{extent.tensor.path} ends at byte {offset}, in {extent.tensor.name}; {REMEDY}")
            target, offset = target[num_read:], offset + num_read

    def rows(self, extent: _Extent) -> torch.Tensor:
        """The piece that was read, on the device."""
        staged = self._bytes[: extent.num_bytes].view(extent.tensor.dtype).view(extent.shape)
        rows = staged.to(self._device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return rows

    def wait_until_free(self) -> None:
        """Until the device has taken what was in it."""
        if self._copied is not None:
            self._copied.synchronize()


def read_pieces(tensors: Iterable[tuple[StoredTensor, int]], device: torch.device) -> Generator[Piece]:
    """All values of `tensors`, in their order, each with the number of rows that must stay together.

    ConfigError when a file cannot be read to its end.
    """
    extents = [extent for tensor, rows_together in tensors for extent in _cut(tensor, rows_together)]
    buffer_bytes = max((extent.num_bytes for extent in extents), default=0)
    num_buffers = min(NUM_BUFFERS, len(extents))
    free = deque(_Buffer(buffer_bytes, device) for _ in range(num_buffers))
    ahead: deque[tuple[_Extent, _Buffer, Future[None]]] = deque()
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in {extent.tensor.path for extent in extents}}
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weights")
        stack.callback(pool.shutdown, cancel_futures=True)  # before the files are closed
        for extent in extents:
            if not free:
                yield from _take(ahead, free)
            buffer = free.popleft()
            buffer.wait_until_free()
            ahead.append((extent, buffer, pool.submit(buffer.fill, files[extent.tensor.path], extent)))
        while ahead:
            yield from _take(ahead, free)


def _take(ahead: deque[tuple[_Extent, _Buffer, Future[None]]], free: deque[_Buffer]) -> Iterator[Piece]:
    extent, buffer, is_read = ahead.popleft()
    is_read.result()
    yield Piece(extent.tensor, extent.first_row, buffer.rows(extent))
    free.append(buffer)


def _open(path: Path, stack: ExitStack) -> int:
    try:
        file_descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    stack.callback(os.close, file_descriptor)
    return file_descriptor


def _cut(tensor: StoredTensor, rows_together: int) -> Iterator[_Extent]:
    num_rows, row_bytes = tensor.shape[0], tensor.num_bytes // tensor.shape[0]
    step = max(1, PIECE_BYTES // row_bytes // rows_together) * rows_together
    for first in range(0, num_rows, step):
        rows = min(step, num_rows - first)
        yield _Extent(tensor, first, (rows, *tensor.shape[1:]), tensor.offset + first * row_bytes, rows * row_bytes)
