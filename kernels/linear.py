"""A linear layer of any number of rows: the launcher that picks one of the two kernels, which agree bit for bit."""

from __future__ import annotations

import torch

from kernels.large_gemm import large_gemm
from kernels.launch import Device
from kernels.skinny_gemm import MAX_ROWS, skinny_gemm


def linear(
    device: Device,
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: torch.Tensor,
) -> None:
    """out = (x W^T) * x_scale * weight_scale + residual; the contract of `skinny_gemm`, without its bound on M.

    M, the rows that the tensors have room for, decides: up to 128 of them are limited by reading the weights, more by
    multiplying. A row's result depends on neither.
    """
    launch = skinny_gemm if x.shape[0] <= MAX_ROWS else large_gemm
    launch(
        device,
        x=x,
        weight=weight,
        x_scale=x_scale,
        weight_scale=weight_scale,
        residual=residual,
        out=out,
        num_rows=num_rows,
    )
