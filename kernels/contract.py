"""Checks of what a launcher was given: sizes that must agree by name, dtype, place, alignment, contiguity, overlap."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kernels.arguments import Argument, Buffer, TensorMap
from kernels.errors import ContractError
from kernels.launch import Device


def check_arguments(op: str, device: Device, arguments: Iterable[Argument]) -> dict[str, int]:
    """Checks every tensor of a launch against its `Buffer`, and gives the sizes: shape letter -> int.

    Null pointers are skipped, and so are scalars. A tensor that is written must not overlap another one.
    ContractError names `op`, the tensor, what was expected and what was found.
    """
    buffers = [buffer for argument in arguments if (buffer := _buffer(argument)) is not None]
    sizes: dict[str, int] = {}
    said_by: dict[str, str] = {}
    for buffer in buffers:
        tensor = buffer.tensor
        if tensor is None:
            continue
        _check_shape(op, buffer, tensor, sizes, said_by)
        _expect(op, buffer, "dtype", buffer.dtype, tensor.dtype)
        _expect(op, buffer, "device", device.torch_device, tensor.device)
        if not tensor.is_contiguous():
            raise ContractError(f"{op}: {buffer.name} has strides {list(tensor.stride())}, expected contiguous")
        if (beyond := tensor.data_ptr() % buffer.alignment) != 0:
            raise ContractError(
                f"{op}: {buffer.name} lies {beyond} bytes behind a multiple of {buffer.alignment}, "
                f"expected an address that is one"
            )
    _check_overlap(op, buffers)
    return sizes


def check_size(
    op: str, name: str, value: int, *, multiple_of: int = 1, at_least: int = 0, at_most: int | None = None
) -> None:
    """ContractError unless `value` is a multiple of `multiple_of` within the two bounds (inclusive)."""
    if value % multiple_of or value < at_least or (at_most is not None and value > at_most):
        bounds = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        multiple = f"a multiple of {multiple_of}, " if multiple_of > 1 else ""
        raise ContractError(f"{op}: {name} is {value}, expected {multiple}{bounds}")


def _buffer(argument: Argument) -> Buffer | None:
    match argument:
        case Buffer():
            return argument
        case TensorMap():
            return argument.buffer
        case _:
            return None


def _check_shape(op: str, buffer: Buffer, tensor: torch.Tensor, sizes: dict[str, int], said_by: dict[str, str]) -> None:
    words = buffer.shape.split()
    found = list(tensor.shape)
    if len(words) != len(found):
        raise ContractError(
            f"{op}: {buffer.name} has shape {found}, expected {len(words)} dimensions [{', '.join(words)}]"
        )
    for word, size in zip(words, found, strict=True):
        if word.isdecimal():
            expected, reason = int(word), ""
        else:
            expected = sizes.setdefault(word, size)
            reason = f" with {word} = {expected} as in {said_by.setdefault(word, buffer.name)}"
        if size != expected:
            raise ContractError(f"{op}: {buffer.name} has shape {found}, expected [{', '.join(words)}]{reason}")


def _expect(op: str, buffer: Buffer, what: str, expected: object, found: object) -> None:
    if found != expected:
        raise ContractError(f"{op}: {buffer.name} has {what} {found}, expected {expected}")


def _check_overlap(op: str, buffers: list[Buffer]) -> None:
    lying = [buffer for buffer in buffers if _has_memory(buffer)]
    for buffer in lying:
        if not buffer.access.writes:
            continue
        for other in lying:
            if (
                other is not buffer
                and buffer.address < other.address + other.num_bytes
                and other.address < buffer.address + buffer.num_bytes
            ):
                raise ContractError(
                    f"{op}: {buffer.name} is written and shares memory with {other.name}, expected none in common"
                )


def _has_memory(buffer: Buffer) -> bool:
    """Tensors of torch's device meta have sizes alone."""
    return buffer.tensor is not None and buffer.num_bytes > 0 and not buffer.tensor.is_meta
