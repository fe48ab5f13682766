"""What a kernel is launched with: buffers, tensor maps and scalars, each by name, and the array a launch takes them as."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64


class Access(enum.Enum):
    """What a kernel does with a buffer.

    CONSTANT is read, and written by nothing that may still run when this kernel starts (weights, tables): only such a
    buffer may be read before `griddepcontrol.wait`.
    """

    READ = "read"
    WRITE = "write"
    UPDATE = "update"
    CONSTANT = "constant"

    @property
    def reads(self) -> bool:
        """Whether what the buffer held before matters."""
        return self is not Access.WRITE

    @property
    def writes(self) -> bool:
        """Whether the kernel changes the buffer."""
        return self in (Access.WRITE, Access.UPDATE)


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor that a kernel gets as a pointer; `tensor` None is a null pointer, for what the kernel can do without.

    `shape` has one word per dimension: a letter or name (which must agree with every other tensor of the launch), or a
    number; it is checked with dtype and `alignment` (in bytes) by `kernels.contract.check_arguments`.
    """

    name: str
    tensor: torch.Tensor | None
    access: Access
    shape: str
    dtype: torch.dtype
    alignment: int = 16

    @property
    def address(self) -> int:
        """Where the first element is; 0 for a null pointer."""
        return 0 if self.tensor is None else self.tensor.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Bytes from the first element to behind the last; buffers are contiguous."""
        return 0 if self.tensor is None else self.tensor.numel() * self.tensor.element_size()


class Swizzle(enum.IntEnum):
    """Which address bits a tensor-map copy exchanges in shared memory; values are CUtensorMapSwizzle's."""

    NONE = 0
    BYTES_32 = 1
    BYTES_64 = 2
    BYTES_128 = 3

    @property
    def span_bytes(self) -> int | None:
        """Most bytes of a box's innermost dimension; None: no bound."""
        return None if self is Swizzle.NONE else 16 << self.value


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A box-wise view of a buffer for the tensor memory accelerator, passed by value (`__grid_constant__`).

    Sizes are innermost first, as `cuTensorMapEncodeTiled` has them: `dims` in elements, `strides_bytes` of dimensions 1
    and up, `box` in elements. Interleave is none, element strides are 1, what lies outside reads as zero.
    """

    buffer: Buffer
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: Swizzle = Swizzle.NONE
    l2_promotion_bytes: int = 256

    @property
    def name(self) -> str:
        """The buffer's."""
        return self.buffer.name

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.buffer.dtype.itemsize


@dataclass(frozen=True)
class Scalar:
    """A number passed by value; make one with `int32`, `int64`, `uint32`, `uint64` or `float32`."""

    name: str
    value: int | float
    ctype: type[ctypes._SimpleCData[int]] | type[ctypes._SimpleCData[float]]


def int32(name: str, value: int) -> Scalar:
    """A C `int`; ValueError if `value` does not fit."""
    return _integer(name, value, ctypes.c_int32, "int32")


def int64(name: str, value: int) -> Scalar:
    """A C `long long`; ValueError if `value` does not fit."""
    return _integer(name, value, ctypes.c_int64, "int64")


def uint32(name: str, value: int) -> Scalar:
    """A C `unsigned`; ValueError if `value` does not fit."""
    return _integer(name, value, ctypes.c_uint32, "uint32")


def uint64(name: str, value: int) -> Scalar:
    """A C `unsigned long long`; ValueError if `value` does not fit."""
    return _integer(name, value, ctypes.c_uint64, "uint64")


def float32(name: str, value: float) -> Scalar:
    """A C `float`, rounded to the nearest."""
    return Scalar(name, float(value), ctypes.c_float)


Argument = Buffer | TensorMap | Scalar


class AlignedRoom:
    """Memory for one encoded tensor map, at a multiple of 64 bytes."""

    def __init__(self, encoded: bytes = bytes(TENSOR_MAP_BYTES)) -> None:
        if len(encoded) != TENSOR_MAP_BYTES:
            raise ValueError(f"a tensor map of {len(encoded)} bytes, expected {TENSOR_MAP_BYTES}")
        self._memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT)
        self.address = -(-ctypes.addressof(self._memory) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
        ctypes.memmove(self.address, encoded, TENSOR_MAP_BYTES)

    def read(self) -> bytes:
        """The 128 bytes."""
        return ctypes.string_at(self.address, TENSOR_MAP_BYTES)


class ArgumentArray:
    """The `void*` array of `cuLaunchKernelEx`'s kernelParams, one address of a value per argument, and those values.

    `encode_tensor_map` makes the 128 bytes of a tensor map; they are placed at a multiple of 64 bytes. The array is
    valid as long as this object lives.
    """

    def __init__(self, arguments: Sequence[Argument], encode_tensor_map: Callable[[TensorMap], bytes]) -> None:
        # The array holds addresses only: the values live here.
        self._values: list[object] = []
        addresses = [self._place(argument, encode_tensor_map) for argument in arguments]
        self._array = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)

    @property
    def address(self) -> int:
        """What goes into kernelParams."""
        return ctypes.addressof(self._array)

    def __len__(self) -> int:
        return len(self._values)

    def _place(self, argument: Argument, encode_tensor_map: Callable[[TensorMap], bytes]) -> int:
        match argument:
            case Buffer():
                pointer = ctypes.c_void_p(argument.address)
                self._values.append(pointer)
                return ctypes.addressof(pointer)
            case TensorMap():
                room = AlignedRoom(encode_tensor_map(argument))
                self._values.append(room)
                return room.address
            case Scalar():
                value = argument.ctype(argument.value)  # type: ignore[arg-type]
                self._values.append(value)
                return ctypes.addressof(value)


def _integer(name: str, value: int, ctype: type[ctypes._SimpleCData[int]], type_name: str) -> Scalar:
    num_bits = 8 * ctypes.sizeof(ctype)
    lowest, highest = (
        (0, (1 << num_bits) - 1) if type_name[0] == "u" else (-(1 << num_bits - 1), (1 << num_bits - 1) - 1)
    )
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: {value} does not fit {type_name}, {lowest} to {highest}")
    return Scalar(name, int(value), ctype)
