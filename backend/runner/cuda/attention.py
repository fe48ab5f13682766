"""The attention of a step: which kernel computes which rows, and the memory that they share.

Rows of generated tokens come first and are `decode_attention`'s, in slices; rows of prompts are `prefill_attention`'s, in
tiles. The two round differently, so a row's kernel follows from what its token is in its own sequence, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.runner.cuda.activations import LinearInput
from backend.runner.cuda.step_tokens import StepTokens, width_for
from kernels.decode_attention import decode_attention, make_workspace, max_items, schedule_attention
from kernels.launch import Device
from kernels.prefill_attention import max_tiles, plan_tiles, prefill_attention

SLICE_ROWS = 256
"""Rows of one launch at most. Partial results take 4 (D + 2) H bytes for each chunk of a row: 1 MiB a row at 131,072 tokens."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a graph is captured for: `width` rows, of which the first `generated_width` may be generated tokens (0: none is)."""

    width: int
    generated_width: int
    has_prompts: bool


def shape_of(tokens: StepTokens, max_rows: int) -> StepShape:
    """The smallest shape that holds a step. Generated rows by slices: a row that sees nothing costs little, a graph more."""
    width = width_for(len(tokens.token_ids), max_rows)
    return StepShape(width, min(width, num_slices(tokens.num_generated) * SLICE_ROWS), bool(tokens.chunks))


def num_slices(num_rows: int) -> int:
    """Launches that `num_rows` rows of generated tokens take in a layer."""
    return -(-num_rows // SLICE_ROWS)


def attention_bytes(config: ModelConfig, max_rows: int, max_pages: int) -> int:
    """What StepAttention allocates."""
    num_items = max_items(min(max_rows, SLICE_ROWS), max_pages)
    return 4 * num_items * (config.num_heads * (config.head_dim + 2) + 2 * num_slices(max_rows))


class StepAttention:
    """Attention over pages of the rows of a step: planned once, run in every layer."""

    def __init__(
        self,
        device: Device,
        num_heads: int,
        num_kv_heads: int,
        *,
        page_tables: torch.Tensor,
        tokens: Mapping[int, Mapping[str, torch.Tensor]],
        num_tiles: torch.Tensor,
        unscaled: torch.Tensor,
    ) -> None:
        """Allocate for steps of up to R rows, the largest key of `tokens`.

        INT32, read at each run: page_tables [slots, pages]; of each width the `tokens`: slots [width], of each row its row of
        them; lengths [width], the keys it sees if it is a generated token, else 0; tiles [n, 4] of the rows of prompts, and
        num_tiles [1], how many there are. unscaled [R, H D] BF16: written in between.
        """
        self._device = device
        self._num_heads, self._num_kv_heads = num_heads, num_kv_heads
        self._page_tables = page_tables
        self._tokens = tokens
        self._unscaled = unscaled
        place, num_rows = device.torch_device, max(tokens)
        self._num_rows = torch.full((1,), SLICE_ROWS, dtype=torch.int32, device=place)
        workspace = make_workspace(min(num_rows, SLICE_ROWS), page_tables.shape[1], num_heads, place)
        # Slices run one after the other, so they share the partial results, but not their schedules.
        self._partials = {name: workspace[name] for name in ("sums", "stats")}
        self._schedules = [
            {name: torch.zeros_like(workspace[name]) for name in ("items", "first_items")}
            for _ in range(num_slices(num_rows))
        ]
        self._num_tiles = num_tiles

    def schedule(self, shape: StepShape) -> None:
        """Once a step, before any `run` of the same shape."""
        lengths = self._tokens[shape.width]["lengths"]
        for index, part in enumerate(_slices(shape.generated_width)):
            schedule_attention(
                self._device,
                lengths=lengths[part],
                num_rows=self._num_rows,
                **self._schedule(index, part),
            )

    def run(
        self,
        shape: StepShape,
        queries: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor | None, torch.Tensor | None],
        out: LinearInput,
    ) -> None:
        """Write `out` [width, H D] from queries [width, H, D] BF16 and `pages` of K and V, with their `scales` where FP8."""
        tokens = self._tokens[shape.width]
        for index, part in enumerate(_slices(shape.generated_width)):
            decode_attention(
                self._device,
                q=queries[part],
                k_pages=pages[0],
                v_pages=pages[1],
                k_scale=scales[0],
                v_scale=scales[1],
                page_tables=self._page_tables,
                sequences=tokens["slots"][part],
                lengths=tokens["lengths"][part],
                **self._schedule(index, part),
                **self._partials,
                out=out.values[part],
                scale=None if out.written_scale is None else out.written_scale[part],
                static_scale=out.static_scale,
            )
        if shape.has_prompts:
            # NOTE: behind decode_attention, which puts zeros where a row sees nothing: those of prompts are written over here.
            prefill_attention(
                self._device,
                q=queries,
                k_pages=pages[0],
                v_pages=pages[1],
                k_scale=scales[0],
                v_scale=scales[1],
                page_tables=self._page_tables,
                tiles=tokens["tiles"],
                num_tiles=self._num_tiles,
                unscaled=None if out.written_scale is None else self._unscaled[: shape.width],
                out=out.values,
                scale=out.written_scale,
                static_scale=out.static_scale,
            )

    def _schedule(self, index: int, part: slice) -> dict[str, torch.Tensor]:
        schedule = self._schedules[index]
        return schedule | {"first_items": schedule["first_items"][: part.stop - part.start + 1]}


def _slices(width: int) -> list[slice]:
    return [slice(first, min(first + SLICE_ROWS, width)) for first in range(0, width, SLICE_ROWS)]


def tiles_of(tokens: StepTokens, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Tiles [n, 4] INT32 of the chunks of prompts in a step, on the CPU."""
    tiles = plan_tiles(tokens.chunks, num_heads, num_kv_heads)
    tiles[:, 1] += tokens.num_generated  # the rows before those of the chunks
    return tiles


def most_tiles(num_rows: int, num_slots: int, num_heads: int, num_kv_heads: int) -> int:
    """Tiles of `num_rows` rows of prompts at most, whatever their chunks."""
    return max_tiles(num_rows, min(num_rows, num_slots), num_heads, num_kv_heads)
