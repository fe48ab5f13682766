"""A StepPlan on the device: one row of every tensor per token, padded to whole tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PAGE_TOKENS, StepPlan
from backend.runner.gathered_attention import GatheredRows, GatherSize, group_rows
from backend.runner.linear import padded_rows
from backend.runner.work_items import IntArray, ItemSizes, WorkItems, build_work_items


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of a step in the order of the plan's rows, padded to a multiple of 16 (R). Index tensors are int64.

    `token_ids`, `positions` [R], padding is id 0 at position 0. `pages`, `offsets` [T]: where the tokens' K and V go.
    `fresh_pages` [n]: pages whose first token is in this step. The step's attention is in `items` or, to be
    done on gathered pages, in `gathered`.

    On the host, NumPy: `first_tokens` [rows], the token index each row begins at; and [S], of each row with
    `is_sampled`: `sampled_tokens`, the index of its last token, `sampled_slots`, the slot that gets the new id, and
    `sampled_positions`, the new id's position in its sequence. `forced`: slot and ids of each row with `num_forced`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    fresh_pages: torch.Tensor
    items: tuple[WorkItems, ...]
    gathered: tuple[GatheredRows, ...]
    first_tokens: IntArray
    sampled_tokens: IntArray
    sampled_slots: IntArray
    sampled_positions: IntArray
    forced: tuple[tuple[int, tuple[int, ...]], ...]


def build_batch(plan: StepPlan, config: ModelConfig, last_ids: torch.Tensor, sizes: ItemSizes | GatherSize) -> Batch:
    """Lay the plan out on the device of `last_ids` [slots] int64, from which decode rows take their id.

    `sizes` of the attention's work items, or of its gathers.
    """
    rows, device = plan.rows, last_ids.device
    num_tokens = plan.num_tokens
    lengths = np.array([row.num_tokens for row in rows])
    first_tokens = np.cumsum(lengths) - lengths
    positions = np.zeros(padded_rows(num_tokens), dtype=np.int64)
    positions[:num_tokens] = np.concatenate([np.arange(row.start, row.start + row.num_tokens) for row in rows])
    pages = np.fromiter(
        (
            row.page_ids[position // PAGE_TOKENS]
            for row in rows
            for position in range(row.start, row.start + row.num_tokens)
        ),
        dtype=np.int64,
        count=num_tokens,
    )
    offsets = positions[:num_tokens] % PAGE_TOKENS
    ids = np.zeros(padded_rows(num_tokens), dtype=np.int64)
    for first, row in zip(first_tokens, rows, strict=True):
        if not row.is_decode:
            ids[first : first + row.num_tokens] = row.token_ids
    is_decode = np.array([row.is_decode for row in rows])
    slots = np.array([row.slot for row in rows])
    token_ids = torch.from_numpy(ids).to(device)
    if is_decode.any():
        decode_slots = torch.from_numpy(slots[is_decode]).to(device)
        token_ids[torch.from_numpy(first_tokens[is_decode]).to(device)] = last_ids.index_select(0, decode_slots)

    sampled = np.flatnonzero([row.is_sampled for row in rows])
    return Batch(
        token_ids=token_ids,
        positions=torch.from_numpy(positions).to(device),
        pages=torch.from_numpy(pages).to(device),
        offsets=torch.from_numpy(offsets).to(device),
        fresh_pages=torch.from_numpy(pages[offsets == 0]).to(device),
        items=build_work_items(rows, config.num_heads, config.num_kv_heads, device, sizes)
        if isinstance(sizes, ItemSizes)
        else (),
        gathered=group_rows(rows, config.num_kv_heads, device, sizes) if isinstance(sizes, GatherSize) else (),
        first_tokens=first_tokens,
        sampled_tokens=(first_tokens + lengths - 1)[sampled],
        sampled_slots=slots[sampled],
        sampled_positions=np.array([row.start + row.num_tokens for row in rows])[sampled],
        forced=tuple((row.slot, row.token_ids[-row.num_forced :]) for row in rows if row.num_forced),
    )
