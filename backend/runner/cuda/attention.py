"""The attention of a step: which kernel computes which rows, and the memory that they share."""

from __future__ import annotations

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.runner.cuda.activations import LinearInput
from kernels.decode_attention import decode_attention, make_workspace, max_items, schedule_attention
from kernels.launch import Device

SLICE_ROWS = 256
"""Rows of one launch at most. Partial results take 4 (D + 2) H bytes for each chunk of a row: 2 MiB a row at 131,072 tokens."""


def num_slices(num_rows: int) -> int:
    """Launches that `num_rows` rows take in a layer."""
    return -(-num_rows // SLICE_ROWS)


def attention_bytes(config: ModelConfig, max_rows: int, max_pages: int) -> int:
    """What StepAttention allocates."""
    num_items = max_items(min(max_rows, SLICE_ROWS), max_pages)
    return 4 * num_items * (config.num_heads * (config.head_dim + 2) + 2 * num_slices(max_rows))


class StepAttention:
    """Attention over pages of the rows of a step, in slices that are scheduled once and run in every layer."""

    def __init__(
        self,
        device: Device,
        num_heads: int,
        *,
        page_tables: torch.Tensor,
        sequences: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Allocate for up to R rows.

        INT32, read at each run: page_tables [slots, pages]; sequences [R], of each row its row of them; lengths [R], the
        keys it sees, 0 for a row that the step does not fill.
        """
        self._device = device
        self._page_tables = page_tables
        self._sequences = sequences
        self._lengths = lengths
        place, num_rows = device.torch_device, len(lengths)
        self._num_rows = torch.full((1,), SLICE_ROWS, dtype=torch.int32, device=place)
        workspace = make_workspace(min(num_rows, SLICE_ROWS), page_tables.shape[1], num_heads, place)
        # Slices run one after the other, so they share the partial results, but not their schedules.
        self._partials = {name: workspace[name] for name in ("sums", "stats")}
        self._schedules = [
            {name: torch.zeros_like(workspace[name]) for name in ("items", "first_items")}
            for _ in range(num_slices(num_rows))
        ]

    def schedule(self, width: int) -> None:
        """Once a step, before any `run` of the same width."""
        for index, part in enumerate(_slices(width)):
            schedule_attention(
                self._device,
                lengths=self._lengths[part],
                num_rows=self._num_rows,
                **self._schedule(index, part),
            )

    def run(
        self,
        width: int,
        queries: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        out: LinearInput,
    ) -> None:
        """Write `out` [width, H D] from queries [width, H, D] BF16 and `pages` of K and V, with their `scales` where FP8."""
        for index, part in enumerate(_slices(width)):
            decode_attention(
                self._device,
                q=queries[part],
                k_pages=pages[0],
                v_pages=pages[1],
                k_scale=scales[0],
                v_scale=scales[1],
                page_tables=self._page_tables,
                sequences=self._sequences[part],
                lengths=self._lengths[part],
                **self._schedule(index, part),
                **self._partials,
                out=out.values[part],
                scale=None if out.written_scale is None else out.written_scale[part],
                static_scale=out.static_scale,
            )

    def _schedule(self, index: int, part: slice) -> dict[str, torch.Tensor]:
        schedule = self._schedules[index]
        return schedule | {"first_items": schedule["first_items"][: part.stop - part.start + 1]}


def _slices(width: int) -> list[slice]:
    return [slice(first, min(first + SLICE_ROWS, width)) for first in range(0, width, SLICE_ROWS)]
