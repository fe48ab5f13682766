"""One unit kernel: what it is launched with, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.arguments import Access, Argument, Buffer
from kernels.launch import Device, Dim3, Launch
from kernels.program import Program

HERE = Path(__file__).parent
UNITS = Program(HERE / "units.cu")

Tensors = dict[str, torch.Tensor]
Array = NDArray[Any]


@dataclass(frozen=True)
class Unit:
    """A launch of `kernel` in `program`, on tensors made on the CPU.

    `outputs` name the tensors it writes (those also in `updated` are read before); `constants` may be read before
    griddep_wait. `arguments` puts tensor maps and scalars where the kernel wants them; without it, the tensors in their
    order are the arguments. `expected` computes from the inputs what must come out, bit for bit, or within `tolerance`
    (relative) where the instruction is an approximation.
    """

    name: str
    kernel: str
    tensors: Callable[[], Tensors]
    expected: Callable[[Tensors], Mapping[str, Array]]
    outputs: tuple[str, ...] = ("out",)
    updated: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    arguments: Callable[[Mapping[str, Buffer]], tuple[Argument, ...]] | None = None
    program: Program = UNITS
    grid: Dim3 = (1, 1, 1)
    block: Dim3 = (32, 1, 1)
    cluster: Dim3 = (1, 1, 1)
    shared_bytes: int = 0
    overlaps_previous: bool = False
    tolerance: float = 0.0

    def run(self, device: Device) -> Tensors:
        """What the outputs hold after the kernel ran on `device`, on the CPU."""
        tensors = {name: tensor.to(device.torch_device) for name, tensor in self.tensors().items()}
        buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        arguments = tuple(buffers.values()) if self.arguments is None else self.arguments(buffers)
        launch = Launch(
            self.program,
            self.kernel,
            self.grid,
            self.block,
            arguments,
            self.cluster,
            self.shared_bytes,
            self.overlaps_previous,
        )
        device.launch(launch)
        device.synchronize()
        return {name: tensors[name].cpu() for name in self.outputs}

    def _buffer(self, name: str, tensor: torch.Tensor) -> Buffer:
        if name in self.updated:
            access = Access.UPDATE
        elif name in self.outputs:
            access = Access.WRITE
        else:
            access = Access.CONSTANT if name in self.constants else Access.READ
        shape = " ".join(str(size) for size in tensor.shape)
        return Buffer(name, tensor, access, shape, tensor.dtype)

    def check(self, outputs: Tensors) -> None:
        """AssertionError if `outputs` are not the expected ones."""
        for name, expected in self.expected(self.tensors()).items():
            found = bits(outputs[name]) if self.tolerance == 0 else outputs[name].double().numpy()
            if self.tolerance == 0:
                same = np.array_equal(
                    found.reshape(-1).view(np.uint8), np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
                )
                assert same, f"{self.name}: {name} differs: {difference(found, expected)}"
            else:
                np.testing.assert_allclose(found, expected, rtol=self.tolerance, atol=self.tolerance, err_msg=self.name)


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def difference(found: NDArray[np.uint8], expected: Array) -> str:
    """Where the first bytes differ, for a message."""
    want = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
    if want.size != found.size:
        return f"{found.size} bytes, expected {want.size}"
    where = np.flatnonzero(want != found)
    return f"{where.size} of {want.size} bytes, first at {where[0]}: {found[where[0]]} instead of {want[where[0]]}"


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An output, full of bytes that no kernel writes by chance."""
    return torch.full((*shape[:-1], shape[-1] * dtype.itemsize), 0xFF, dtype=torch.uint8).view(dtype)


def tensor(values: Array) -> torch.Tensor:
    """Values as a tensor of the same bits; unsigned ones as signed."""
    signed = {np.uint16: np.int16, np.uint32: np.int32, np.uint64: np.int64}
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values.view(signed.get(values.dtype.type, values.dtype.type)).copy())


def unsigned(values: torch.Tensor) -> NDArray[np.uint32]:
    """A 32-bit tensor's values as unsigned numbers."""
    return values.numpy().view(np.uint32)
