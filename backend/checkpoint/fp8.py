"""FP8 (e4m3) values with scales: real value = stored value * scale.

e4m3 has 4 bits of exponent and 3 of fraction: largest value 448, smallest normal 2^-6, NaN but no infinity (source: OCP
8-bit Floating Point Specification 1.0).
"""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
MAX = 448.0
MIN_SCALE = 2.0**-100
"""Scale of a row of zeros; far below any other, and its quotients stay finite."""


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """Scales [rows] FP32 that bring the largest magnitude of each row of x [rows, columns] to 448."""
    return (x.abs().amax(dim=1).float() / MAX).clamp_min_(MIN_SCALE)


def quantise(x: torch.Tensor, scales: torch.Tensor | float) -> torch.Tensor:
    """x FP32 / scales, to the nearest e4m3, ties to even, at most 448 in magnitude; NaN stays NaN.

    x [rows, columns] with scales [rows] or [1], or x of any shape with one number.
    """
    divisors = scales.unsqueeze(1) if isinstance(scales, torch.Tensor) else scales
    return (x / divisors).clamp_(-MAX, MAX).to(DTYPE)
