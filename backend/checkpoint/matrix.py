"""A weight matrix of a linear layer, plain or FP8, and the dtypes a model is held in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.checkpoint import fp8


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of `y = x W^T`, in whole rows of outputs.

    values: [outputs, inputs] in the weight dtype, or e4m3 values.
    scales: None, or [outputs] FP32, real weight = value * scale of its row; then inputs are quantised to e4m3 too.
    input_scale: None: each row of inputs gets its own scale; or [1] FP32, the scale of all inputs, from the checkpoint.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values.shape[0], self.values.shape[1]

    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        tensors = (self.values, self.scales, self.input_scale)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What a model is held in.

    `dense`: dtype of the embedding and of every matrix that is not FP8. `fp8_values`: dtype the e4m3 values are held in,
    e4m3 itself, or FP32 on the CPU: there PyTorch took 7.8 ns to convert one, and 1.7 to multiply one with 16 rows (AMD EPYC).
    """

    dense: torch.dtype
    has_fp8_linears: bool = False
    has_fp8_head: bool = False
    fp8_values: torch.dtype = fp8.DTYPE

    def allocate(self, rows: int, columns: int, device: torch.device, *, is_fp8: bool, has_input_scale: bool) -> Matrix:
        """A matrix whose contents are still to come; its input scale is 0, so that the largest of several can be taken."""
        if not is_fp8:
            return Matrix(torch.empty(rows, columns, device=device, dtype=self.dense))
        return Matrix(
            torch.empty(rows, columns, device=device, dtype=self.fp8_values),
            torch.empty(rows, device=device, dtype=torch.float32),
            torch.zeros(1, device=device, dtype=torch.float32) if has_input_scale else None,
        )

    def matrix_bytes(self, rows: int, columns: int, *, is_fp8: bool, has_input_scale: bool = False) -> int:
        """Bytes of such a matrix."""
        if not is_fp8:
            return rows * columns * self.dense.itemsize
        return rows * (columns * self.fp8_values.itemsize + 4) + (4 if has_input_scale else 0)
