"""FP8 e4m3 as the kernels make it: scales of rows, and how far a code may be from what it stands for."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-10
"""A row of zeros gets the scale AMAX_FLOOR / 448."""


def row_scales(values: torch.Tensor) -> torch.Tensor:
    """Scales [M] of rows [M, n]: the largest |value| over 448, with a floor."""
    return values.abs().amax(dim=1).clamp(min=AMAX_FLOOR) / E4M3_MAX


def code_bounds(values: torch.Tensor, relative_error: float) -> torch.Tensor:
    """How far the e4m3 code of each value may be from it: half a unit in its last place, and the value's own error.

    A unit is 2^-3 of the power of two below the value, at least 2^-9 (subnormals). `relative_error` moves the value, and
    with it perhaps the code, by one unit at a tie: then the difference is half a unit and the value's error.
    """
    magnitudes = values.double().abs().clamp(max=E4M3_MAX)
    units = torch.exp2(torch.floor(torch.log2(magnitudes.clamp(min=2.0**-6))) - 3)
    return units / 2 + magnitudes * relative_error
