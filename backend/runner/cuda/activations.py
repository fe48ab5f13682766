"""What flows between the kernels of a layer: rows in BF16, or in e4m3 with the scales their consumer needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backend.checkpoint.matrix import Matrix


@dataclass(frozen=True, slots=True)
class LinearInput:
    """Rows [R, inputs] that a linear layer reads, as a kernel writes them.

    BF16 without scales. Or e4m3, with `scale` [R] that the writer fills with a scale for each row; or with `static_scale`
    [1] from the checkpoint, and then `scale` holds it R times, for the linear layer.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None
    static_scale: torch.Tensor | None = None

    @property
    def written_scale(self) -> torch.Tensor | None:
        """The scales that the writer of the rows must fill."""
        return self.scale if self.static_scale is None else None

    def first(self, num_rows: int) -> LinearInput:
        """The first rows, in place."""
        return LinearInput(
            self.values[:num_rows], None if self.scale is None else self.scale[:num_rows], self.static_scale
        )


def first_of(memory: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The first of `memory` as [rows, columns]."""
    return memory.flatten()[: rows * columns].view(rows, columns)


def input_of(
    matrix: Matrix, num_rows: int, values: dict[torch.dtype, torch.Tensor], scale: torch.Tensor
) -> LinearInput:
    """The input of `matrix` in memory that others use too: `values` [R, at least inputs] by dtype, `scale` [R]."""
    dtype = torch.bfloat16 if matrix.scales is None else torch.float8_e4m3fn
    rows = first_of(values[dtype], num_rows, matrix.shape[1])
    if matrix.scales is None:
        return LinearInput(rows)
    if matrix.input_scale is None:
        return LinearInput(rows, scale)
    return LinearInput(rows, matrix.input_scale.repeat(num_rows), matrix.input_scale)
