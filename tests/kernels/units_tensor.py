"""Unit kernels of TMA: boxes of tensors of 2 to 5 dimensions, inside and over the edges, in every swizzle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.arguments import Argument, Buffer, Swizzle, TensorMap, int32
from tests.kernels.unit import Array, Tensors, Unit, filled

# Innermost first. The rows are padded to multiples of 16 bytes, as strides must be.
DIMS = (40, 7, 5, 3, 2)
BOXES = {Swizzle.NONE: 48, Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64, Swizzle.BYTES_128: 128}
BOX_OUTER = (4, 3, 2, 2)
ROW_BYTES = 48


def box_of(rank: int, swizzle: Swizzle) -> tuple[int, ...]:
    """Box sizes in bytes (elements are bytes), innermost first."""
    return (BOXES[swizzle], *BOX_OUTER[: rank - 1])


def strides_of(rank: int) -> tuple[int, ...]:
    """Bytes between neighbours along dimensions 1 and up."""
    strides = [ROW_BYTES]
    for size in DIMS[1 : rank - 1]:
        strides.append(strides[-1] * size)
    return tuple(strides[: rank - 1])


def volume(rank: int) -> tuple[int, ...]:
    """Shape of the whole tensor with its padding, outermost first."""
    return (*reversed(DIMS[1:rank]), ROW_BYTES)


def load_box(values: NDArray[np.uint8], at: tuple[int, ...], box: tuple[int, ...]) -> NDArray[np.uint8]:
    """The box as a dense array, zero outside of the tensor (the padding of a row is outside)."""
    rank = len(box)
    dense = np.zeros(tuple(reversed(box)), np.uint8)
    for index in product(*(range(size) for size in reversed(box))):
        where = [at[axis] + index[rank - 1 - axis] for axis in range(rank)]
        if all(0 <= where[axis] < DIMS[axis] for axis in range(rank)):
            dense[index] = values[tuple(reversed(where))]
    return dense


def swizzle_bytes(dense: NDArray[np.uint8], swizzle: Swizzle) -> NDArray[np.uint8]:
    """Where each 16-byte chunk lies: PTX ISA, "Swizzling modes", tables read as: chunk index XOR row index in the pattern."""
    flat = dense.reshape(-1, 16)
    placed = np.empty_like(flat)
    chunks_per_span = {Swizzle.NONE: 1, Swizzle.BYTES_32: 2, Swizzle.BYTES_64: 4, Swizzle.BYTES_128: 8}[swizzle]
    for index in range(len(flat)):
        line, chunk = index // 8, index % 8  # of 128 bytes
        moved = chunk ^ (line % 8 % chunks_per_span) if chunks_per_span > 1 else chunk
        placed[line * 8 + moved] = flat[index]
    return placed.reshape(-1)


def coordinates(rank: int, load: tuple[int, ...], store: tuple[int, ...]) -> torch.Tensor:
    """As the kernel takes them."""
    return torch.tensor([*load[:rank], *store[:rank]], dtype=torch.int32)


LOAD_AT = (16, 5, -1, 1, 0)
STORE_AT = (-16, 1, 3, -1, 1)


def tensors(rank: int, swizzle: Swizzle, copies: int) -> Tensors:
    values = np.random.default_rng(rank).integers(0, 256, volume(rank), dtype=np.uint8)
    num_bytes = int(np.prod(box_of(rank, swizzle)))
    return {
        "in": torch.from_numpy(values),
        "out": filled(volume(rank), torch.uint8),
        "seen": filled((copies * num_bytes,), torch.uint8),
        "at": coordinates(rank, LOAD_AT, STORE_AT),
    }


def tensor_map(buffer: Buffer, rank: int, swizzle: Swizzle) -> TensorMap:
    return TensorMap(buffer, DIMS[:rank], strides_of(rank), box_of(rank, swizzle), swizzle)


def call(rank: int, swizzle: Swizzle, multicast: bool, buffers: Mapping[str, Buffer]) -> tuple[Argument, ...]:
    maps: tuple[Argument, ...] = (tensor_map(buffers["in"], rank, swizzle),)
    if not multicast:
        maps = (*maps, tensor_map(buffers["out"], rank, swizzle))
    num_bytes = int(np.prod(box_of(rank, swizzle)))
    return (*maps, buffers["seen"], buffers["at"], int32("num_bytes", num_bytes))


def expected(rank: int, swizzle: Swizzle, multicast: bool, t: Tensors) -> dict[str, Array]:
    dense = load_box(t["in"].numpy(), LOAD_AT[:rank], box_of(rank, swizzle))
    seen = np.tile(swizzle_bytes(dense, swizzle), 2)
    if multicast:
        return {"seen": seen}
    out = t["out"].numpy().copy()
    for index in product(*(range(size) for size in dense.shape)):
        where = [STORE_AT[axis] + index[rank - 1 - axis] for axis in range(rank)]
        if all(0 <= where[axis] < DIMS[axis] for axis in range(rank)):
            out[tuple(reversed(where))] = dense[index]
    return {"seen": seen, "out": out}


def unit(rank: int, swizzle: Swizzle, multicast: bool) -> Unit:
    kind = "multicast" if multicast else "tensor"
    room = -(-int(np.prod(box_of(rank, swizzle))) // 1024) * 1024
    return Unit(
        f"{kind} copies, {rank}D, swizzle {swizzle.name.lower()}",
        f"{kind}_copies_{rank}",
        partial(tensors, rank, swizzle, 2),
        partial(expected, rank, swizzle, multicast),
        outputs=("seen",) if multicast else ("seen", "out"),
        updated=() if multicast else ("out",),
        arguments=partial(call, rank, swizzle, multicast),
        grid=(2, 1, 1) if multicast else (1, 1, 1),
        block=(128, 1, 1),
        cluster=(2, 1, 1) if multicast else (1, 1, 1),
        shared_bytes=room if multicast else 2 * room,
    )


TENSOR_UNITS = tuple(
    unit(rank, swizzle, multicast) for rank in (2, 3, 4, 5) for swizzle in Swizzle for multicast in (False, True)
)
