"""Attention over paged KV, work item by work item, with partial results merged in page order."""

from __future__ import annotations

import torch

from backend.engine.plan import PAGE_TOKENS
from backend.runner.work_items import TILE_ROWS, WorkItems

_HIDDEN_SCORE = -1e30
"""Added to the score of a key a row may not see. Finite, so that a page of which a row sees nothing has weight 0."""
_MIN_EXPONENT = -80.0
"""exp(-80) = 2e-35 stands for everything below: exp is five times slower where it underflows."""


def attend(
    queries: torch.Tensor, key_tiles: torch.Tensor, value_tiles: torch.Tensor, groups: tuple[WorkItems, ...]
) -> torch.Tensor:
    """Causal softmax attention of all tokens of a step.

    queries [T, H, D] FP32, scaled by 1 / sqrt(D) already; key_tiles, value_tiles [num_pages * K, 64, D] in the KV
    dtype, with this step's tokens written. Returns [T, H, D] FP32, zero for tokens that are padding.

    Per item: S = Q K^T, m = max S, p = exp(S - m), l = sum p, o = p V, over visible keys. Per row: M = max of m over
    its pages, then sum of exp(m - M) o over sum of exp(m - M) l, both added in page order. Every product has one
    fixed shape, every other operation is elementwise, or reduces within a row of 64: so a row's result depends on its
    sequence alone.
    """
    flat_queries = queries.flatten(0, 1)
    result = torch.zeros_like(flat_queries)
    for items in groups:
        result.index_copy_(0, items.output_rows, _attend_group(flat_queries, key_tiles, value_tiles, items))
    return result.view_as(queries)


def _attend_group(
    queries: torch.Tensor, key_tiles: torch.Tensor, value_tiles: torch.Tensor, items: WorkItems
) -> torch.Tensor:
    head_dim = queries.shape[1]
    num_items = len(items.item_tiles)
    key_places = torch.arange(PAGE_TOKENS, dtype=torch.float32, device=queries.device)
    tiles = queries.index_select(0, items.tile_rows).view(-1, TILE_ROWS, head_dim)
    item_queries = tiles.index_select(0, items.item_tiles)
    scores = torch.empty(num_items, TILE_ROWS, PAGE_TOKENS, device=queries.device)
    for first in range(0, num_items, items.items_per_call):
        call = slice(first, first + items.items_per_call)
        keys = key_tiles.index_select(0, items.item_kv_tiles[call]).float()
        torch.bmm(item_queries[call], keys.transpose(1, 2), out=scores[call])
    # 1 up to the row's last visible key, 0 behind it: arithmetic in place of a mask, which is six times slower.
    visible = (items.last_visible.unsqueeze(2) - (key_places - 1.0)).clamp_(0.0, 1.0)
    scores.add_((visible - 1.0).mul_(-_HIDDEN_SCORE))
    maxima = scores.amax(dim=2, keepdim=True)
    probabilities = scores.sub_(maxima).clamp_(min=_MIN_EXPONENT).exp_().mul_(visible)
    sums = probabilities.sum(dim=2, keepdim=True)
    outputs = item_queries  # NOTE: reused, the queries are not needed any more.
    for first in range(0, num_items, items.items_per_call):
        call = slice(first, first + items.items_per_call)
        values = value_tiles.index_select(0, items.item_kv_tiles[call]).float()
        torch.bmm(probabilities[call], values, out=outputs[call])
    return _merge(outputs, sums, maxima, items).index_select(0, items.output_sources)


def _merge(outputs: torch.Tensor, sums: torch.Tensor, maxima: torch.Tensor, items: WorkItems) -> torch.Tensor:
    """Rows of all tiles [tiles * 8, D] from the items' outputs [N, 8, D], sums and maxima [N, 8, 1]."""
    num_tiles = items.page_steps[0][1]
    if len(items.page_steps) > 1:
        largest = maxima[:num_tiles].clone()
        for first, count in items.page_steps[1:]:
            torch.maximum(largest[:count], maxima[first : first + count], out=largest[:count])
        weights = maxima.sub_(largest.index_select(0, items.item_tiles)).exp_()
        outputs.mul_(weights)
        sums.mul_(weights)
        for first, count in items.page_steps[1:]:
            outputs[:count].add_(outputs[first : first + count])
            sums[:count].add_(sums[first : first + count])
    return outputs[:num_tiles].div_(sums[:num_tiles]).flatten(0, 1)
