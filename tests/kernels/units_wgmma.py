"""Unit kernels of mma and wgmma. The values are small integers and halves, so that every order of additions is exact."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.hopper_generator import WGMMA_N
from kernels.program import Program
from tests.kernels.unit import HERE, Array, Tensors, Unit, filled

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn}
# Bytes of the rows that hold K, by the kernel's suffix; the tile of b as [K x N] for the transposed form.
ROW_BYTES = {"128": 128, "64": 64, "32": 32, "ra": 128, "transposed": 128}


def values(seed: int, rows: int, columns: int) -> NDArray[np.float32]:
    """Multiples of 1/2 up to 4: exact in every type here."""
    return (np.random.default_rng(seed).integers(-8, 9, (rows, columns)) / 2).astype(np.float32)


def encoded(matrix: NDArray[np.float32], element: str) -> torch.Tensor:
    """A matrix's bytes, rows one after the other."""
    return torch.from_numpy(matrix).to(DTYPES[element]).view(torch.uint8)


def depth(element: str, row_bytes: int) -> int:
    """K of a row."""
    return row_bytes // DTYPES[element].itemsize


def mma_tensors(element: str) -> Tensors:
    k = depth(element, 32)
    return {
        "a": encoded(values(1, 16, k), element),
        "b": encoded(values(2, 8, k), element),
        "out": torch.from_numpy(values(3, 16, 8)),
    }


def mma_expected(element: str, t: Tensors) -> dict[str, Array]:
    k = depth(element, 32)
    return {"out": values(3, 16, 8) + values(1, 16, k) @ values(2, 8, k).T}


def wgmma_tensors(element: str, form: str, n: int) -> Tensors:
    k = depth(element, ROW_BYTES[form])
    b = values(n, n, k)
    if form == "transposed":  # groups of 64 columns, each [K][64]
        b = np.ascontiguousarray(b.T.reshape(k, n // 64, 64).transpose(1, 0, 2)).reshape(-1, 64)
    return {
        "a": encoded(values(n + 1, 64, k), element),
        "b": encoded(b, element),
        "out": filled((64, n), torch.float32),
    }


def wgmma_expected(element: str, form: str, n: int, t: Tensors) -> dict[str, Array]:
    k = depth(element, ROW_BYTES[form])
    return {"out": values(n + 1, 64, k) @ values(n, n, k).T}


def wgmma_units(n: int) -> list[Unit]:
    forms = [("e4m3", "128"), ("e4m3", "64"), ("e4m3", "32"), ("bf16", "128"), ("f16", "128")]
    forms += [(element, "ra") for element in DTYPES]
    if n % 64 == 0:
        forms += [("bf16", "transposed"), ("f16", "transposed")]
    return [
        Unit(
            f"wgmma {element} {form}, N = {n}",
            f"{element}_{form}",
            partial(wgmma_tensors, element, form, n),
            partial(wgmma_expected, element, form, n),
            program=Program(HERE / "units_wgmma.cu", (("N", n),)),
            block=(128, 1, 1),
            shared_bytes=64 * 128 + n * 128,
        )
        for element, form in forms
    ]


MATRIX_UNITS = (
    *(
        Unit(
            f"mma {element}",
            f"mma_{element}",
            partial(mma_tensors, element),
            partial(mma_expected, element),
            updated=("out",),
        )
        for element in DTYPES
    ),
    *(unit for n in WGMMA_N for unit in wgmma_units(n)),
)
