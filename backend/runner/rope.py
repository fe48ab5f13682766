"""Rotary position embedding on half-split pairs: dimension i turns with dimension i + D / 2."""

from __future__ import annotations

import numpy as np
import torch


class RopeTable:
    """Cosines and sines [max_model_len, D / 2] FP32 of position * theta^(-2 i / D).

    Angles are computed in FP64 and rounded once, so that the table is the same on every machine (transformers rounds
    the angle to FP32 before the cosine, which differs by up to position * 2^-24).
    """

    def __init__(self, head_dim: int, theta: float, max_model_len: int, device: torch.device) -> None:
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        angles = np.arange(max_model_len, dtype=np.float64)[:, None] * frequencies
        self._cos = torch.from_numpy(np.cos(angles).astype(np.float32)).to(device)
        self._sin = torch.from_numpy(np.sin(angles).astype(np.float32)).to(device)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, D / 2] of positions [T] int64."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._sin.index_select(0, positions).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] FP32, turned by its token's angles [T, 1, D / 2]; a new tensor."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
