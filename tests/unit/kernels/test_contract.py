from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.arguments import Access, Buffer, TensorMap, int32
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from tests.unit.kernels.fake_device import FakeDevice

DEVICE = FakeDevice()


def read(name: str, tensor: torch.Tensor | None, shape: str, **changes: Any) -> Buffer:
    return Buffer(
        name, tensor, changes.pop("access", Access.READ), shape, changes.pop("dtype", torch.float32), **changes
    )


def test_sizes_by_letter() -> None:
    pages = read("pages", torch.zeros(3, 64, 8), "P 64 E")
    arguments = (
        read("x", torch.zeros(5, 8), "T E"),
        read("bias", None, "E"),
        int32("count", 5),
        TensorMap(pages, (8, 192), (32,), (8, 64)),
        read("empty", torch.zeros(0, 8), "N E", access=Access.WRITE),
    )
    assert check_arguments("op", DEVICE, arguments) == {"T": 5, "E": 8, "P": 3, "N": 0}


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (read("w", torch.zeros(7), "E"), r"w has shape \[7\], expected \[E\] with E = 8 as in x"),
        (read("w", torch.zeros(8, 2), "E 3"), r"w has shape \[8, 2\], expected \[E, 3\]$"),
        (read("w", torch.zeros(8), "E T"), r"w has shape \[8\], expected 2 dimensions \[E, T\]"),
        (read("w", torch.zeros(2, 3), "A A"), r"w has shape \[2, 3\], expected \[A, A\] with A = 2 as in w"),
        (read("w", torch.zeros(8).double(), "E"), r"w has dtype torch.float64, expected torch.float32"),
        (read("w", torch.zeros(8, 5).t(), "T E"), r"w has strides \[1, 5\], expected contiguous"),
        (
            read("w", torch.zeros(9)[1:], "E"),
            r"w lies 4 bytes behind a multiple of 16, expected an address that is one",
        ),
        (read("w", torch.zeros(8, device="meta"), "E"), r"w has device meta, expected cpu"),
    ],
)
def test_broken_contract_is_named(buffer: Buffer, message: str) -> None:
    with pytest.raises(ContractError, match=f"^op: {message}"):
        check_arguments("op", DEVICE, (read("x", torch.zeros(5, 8), "T E"), buffer))


def test_alignment_is_the_buffers_own() -> None:
    check_arguments("op", DEVICE, (read("w", torch.zeros(9)[1:], "E", alignment=4),))


def test_what_is_written_shares_no_memory_with_another_tensor() -> None:
    memory = torch.zeros(64)
    first, second, rest = memory[:16], memory[12:28], memory[16:]
    written = read("out", first, "A", access=Access.WRITE)
    with pytest.raises(ContractError, match="op: out is written and shares memory with x, expected none in common"):
        check_arguments("op", DEVICE, (read("x", second, "B"), written))
    with pytest.raises(ContractError, match="op: out is written and shares memory with x"):
        check_arguments("op", DEVICE, (written, read("x", memory, "B")))
    check_arguments("op", DEVICE, (read("x", rest, "B"), written))
    check_arguments("op", DEVICE, (read("x", first, "A"), read("y", second, "A")))


def test_sizes_are_bounded() -> None:
    check_size("op", "E", 256, multiple_of=128, at_least=128, at_most=256)
    for value, expected in (
        (100, "a multiple of 128, 128 to 256"),
        (0, "a multiple of 128, 128 to 256"),
        (384, "a multiple of 128, 128 to 256"),
    ):
        with pytest.raises(ContractError, match=f"op: E is {value}, expected {expected}"):
            check_size("op", "E", value, multiple_of=128, at_least=128, at_most=256)
    with pytest.raises(ContractError, match=r"op: T is 0, expected at least 1$"):
        check_size("op", "T", 0, at_least=1)
