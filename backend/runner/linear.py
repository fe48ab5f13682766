"""Linear layers in tiles of 16 rows, so that a row's result does not depend on how many others run with it.

BLAS picks its kernel, and with it the order of the additions, by the number of rows: measured on FP32, one row alone
differs bitwise from the same row among others. Every product here therefore has exactly 16 rows, and inside one shape
a row's sum does not depend on which of the 16 it is (checked at start-up, see `invariance`).
"""

from __future__ import annotations

import torch

from backend.checkpoint import fp8
from backend.checkpoint.matrix import Matrix

TILE_ROWS = 16
"""Rows of every product; activations are padded to a multiple of it once, at the start of a step."""
_SCALED_MM_MULTIPLE = 16
"""What torch._scaled_mm wants inputs and outputs to be a multiple of on a GPU."""


def padded_rows(num_rows: int) -> int:
    """Rows of the tiles that hold `num_rows`, at least one tile.

    >>> padded_rows(1), padded_rows(16), padded_rows(17)
    (16, 16, 32)
    """
    return max(1, -(-num_rows // TILE_ROWS)) * TILE_ROWS


def linear(x: torch.Tensor, matrix: Matrix, *, is_tiled: bool, has_scaled_mm: bool = False) -> torch.Tensor:
    """`x W^T`.

    x [R, inputs] FP32, R a multiple of 16 when `is_tiled`; `matrix` [outputs, inputs] in the weight dtype, which the
    product is computed in. Returns [R, outputs] FP32.

    With FP8 weights x is quantised to e4m3 too, each row by its own scale or all by the checkpoint's. The product of the
    e4m3 values, which FP32 and BF16 hold exactly, is multiplied by the scales of row and output. `has_scaled_mm`: the device
    multiplies e4m3 values themselves.
    """
    if matrix.scales is None:
        return _product(x, matrix.values, is_tiled=is_tiled)
    scales = fp8.row_scales(x) if matrix.input_scale is None else matrix.input_scale
    if has_scaled_mm and all(size % _SCALED_MM_MULTIPLE == 0 for size in matrix.shape):
        # Scales of rows and outputs stand outside, so that one call serves every kind of checkpoint and every such device.
        one = torch.ones((), device=x.device)
        product = torch._scaled_mm(
            fp8.quantise(x, scales), matrix.values.t(), scale_a=one, scale_b=one, out_dtype=torch.float32
        )
    else:
        values = matrix.values if matrix.values.dtype != fp8.DTYPE else matrix.values.to(torch.bfloat16)
        product = _product(fp8.quantise(x, scales).to(values.dtype), values, is_tiled=is_tiled)
    return product.mul_(scales.unsqueeze(1)).mul_(matrix.scales)


def _product(x: torch.Tensor, weight: torch.Tensor, *, is_tiled: bool) -> torch.Tensor:
    x = x.to(weight.dtype)
    if not is_tiled:
        return torch.nn.functional.linear(x, weight).float()
    assert x.shape[0] % TILE_ROWS == 0
    result = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=x.device)
    transposed = weight.t()
    for first in range(0, x.shape[0], TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        torch.mm(x[rows], transposed, out=result[rows])
    return result.float()
