from __future__ import annotations

import ctypes

import pytest
import torch

from kernels.arguments import Access, ArgumentArray, Buffer, TensorMap, float32, int32, int64, uint32, uint64


def addresses(array: ArgumentArray) -> list[int]:
    return list((ctypes.c_uint64 * len(array)).from_address(array.address))


def test_array_holds_an_address_of_each_value() -> None:
    tensor = torch.arange(8, dtype=torch.float32)
    buffer = Buffer("x", tensor, Access.READ, "T", torch.float32)
    null = Buffer("bias", None, Access.READ, "T", torch.float32)
    scalars = (int32("a", -5), int64("b", -(1 << 40)), uint32("c", 0xFFFFFFFF), uint64("d", 1 << 63), float32("e", 0.1))
    array = ArgumentArray((buffer, null, *scalars), lambda _: b"")
    x, bias, a, b, c, d, e = addresses(array)
    assert ctypes.c_uint64.from_address(x).value == tensor.data_ptr()
    assert ctypes.c_uint64.from_address(bias).value == 0
    assert ctypes.c_int32.from_address(a).value == -5
    assert ctypes.c_int64.from_address(b).value == -(1 << 40)
    assert ctypes.c_uint32.from_address(c).value == 0xFFFFFFFF
    assert ctypes.c_uint64.from_address(d).value == 1 << 63
    assert ctypes.c_float.from_address(e).value == torch.tensor(0.1, dtype=torch.float32).item()


def test_tensor_maps_lie_in_the_array_by_value_at_multiples_of_64() -> None:
    buffer = Buffer("x", torch.zeros(8, 16), Access.READ, "T E", torch.float32)
    maps = [TensorMap(buffer, (16, 8), (64,), (16, rows)) for rows in range(1, 6)]
    array = ArgumentArray(maps, lambda tensor_map: bytes([tensor_map.box[1]]) * 128)
    for rows, address in enumerate(addresses(array), start=1):
        assert address % 64 == 0
        assert ctypes.string_at(address, 128) == bytes([rows]) * 128
    with pytest.raises(ValueError, match="a tensor map of 64 bytes, expected 128"):
        ArgumentArray(maps, lambda _: bytes(64))


@pytest.mark.parametrize(
    ("make", "lowest", "highest"),
    [
        (int32, -(2**31), 2**31 - 1),
        (uint32, 0, 2**32 - 1),
        (int64, -(2**63), 2**63 - 1),
        (uint64, 0, 2**64 - 1),
    ],
)
def test_integers_that_do_not_fit_are_refused(make: type, lowest: int, highest: int) -> None:
    assert [make("n", value).value for value in (lowest, highest)] == [lowest, highest]
    for value in (lowest - 1, highest + 1):
        with pytest.raises(ValueError, match=rf"n: {value} does not fit {make.__name__}, {lowest} to {highest}"):
            make("n", value)


def test_what_accesses_mean() -> None:
    assert [access.name for access in Access if access.writes] == ["WRITE", "UPDATE"]
    assert [access.name for access in Access if access.reads] == ["READ", "UPDATE", "CONSTANT"]
