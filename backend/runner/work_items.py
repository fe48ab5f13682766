"""How the attention of one step is cut into work items, all of one shape.

A tile is 8 query rows of one sequence and one KV head. Its rows are (token, query head of the group) pairs in that
order, so with 4 query heads per KV head a decode step fills half a tile and a prefill chunk of 64 tokens 32 tiles.
A work item is one tile against one KV page:

    tile 0   page 0 | page 1 | page 2          items in the order of pages, then tiles:
    tile 1   page 0 | page 1                   (0,0) (1,0) (2,0) | (0,1) (1,1) | (0,2)
    tile 2   page 0                            with tiles sorted by falling number of pages

Pages are cut at absolute positions, so how a prompt is split into chunks, or which sequences run beside this one,
changes which items stand next to each other and never the arithmetic of a row. In this order the items of one page step
belong to tiles 0, 1, 2, ..., so partial results are merged in page order by plain slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from backend.engine.plan import PAGE_TOKENS, PlanRow

IntArray = npt.NDArray[np.int64]

TILE_ROWS = 8
"""Query rows of a tile. A decode step fills as many as there are query heads per KV head (4 in Mistral NeMo). On one
core 16 items of 8 rows take 27 us per product, of 16 rows 46 us, of 4 rows 17 us; fewer rows read the pages more
often."""


@dataclass(frozen=True, slots=True)
class ItemSizes:
    """How many items run at a time.

    `per_call` items are in one batched product; fixed, because the product's kernel is chosen by shape. The scores and
    outputs of at most `per_group` items are held at once (6 MB for 1024 at head_dim 128), unless one tile has more.
    """

    per_call: int
    per_group: int


CPU_SIZES = ItemSizes(per_call=16, per_group=1024)


@dataclass(frozen=True, slots=True)
class WorkItems:
    """One group of tiles with all their items, N with padding to a multiple of `items_per_call`. Index tensors are
    int64.

    `tile_rows` [tiles * 8]: query row `token * H + head` of each row of each tile (padding repeats the tile's first).
    `item_tiles`, `item_kv_tiles` [N]: tile, and (page, KV head) tile of KvPages. `last_visible` [N, 8] FP32: the last
    key of the page that the row sees, 0 to 63, or -1 for none. `page_steps`: (first item, number of tiles) of each
    page. `output_rows` [m], `output_sources` [m]: query rows that are real, and where they stand in the tiles.
    """

    items_per_call: int
    tile_rows: torch.Tensor
    item_tiles: torch.Tensor
    item_kv_tiles: torch.Tensor
    last_visible: torch.Tensor
    page_steps: tuple[tuple[int, int], ...]
    output_rows: torch.Tensor
    output_sources: torch.Tensor


def build_work_items(
    rows: tuple[PlanRow, ...],
    num_heads: int,
    num_kv_heads: int,
    device: torch.device,
    sizes: ItemSizes,
) -> tuple[WorkItems, ...]:
    """Cut the attention of a step into groups of items; tokens stand in the order of the rows."""
    group_size = num_heads // num_kv_heads
    # The arrays of this paragraph have one entry per plan row.
    starts = np.array([row.start for row in rows])
    lengths = np.array([row.num_tokens for row in rows])
    first_tokens = np.cumsum(lengths) - lengths
    page_counts = np.array([len(row.page_ids) for row in rows])
    first_pages = np.cumsum(page_counts) - page_counts
    page_ids = np.fromiter((page for row in rows for page in row.page_ids), dtype=np.int64)

    # One entry per tile: its plan row, its KV head, and which 8 (token, head) pairs of the row it holds.
    tiles_per_head = -(-lengths * group_size // TILE_ROWS)
    tile_row = np.repeat(np.arange(len(rows)), tiles_per_head * num_kv_heads)
    within = _ranges(tiles_per_head * num_kv_heads)
    tile_head, tile_index = np.divmod(within, tiles_per_head[tile_row])
    pairs = tile_index[:, None] * TILE_ROWS + np.arange(TILE_ROWS)
    is_real = pairs < (lengths[tile_row] * group_size)[:, None]
    pairs = np.where(is_real, pairs, pairs[:, :1])
    token, head_in_group = np.divmod(pairs, group_size)
    positions = starts[tile_row][:, None] + token
    query_rows = (first_tokens[tile_row][:, None] + token) * num_heads + tile_head[:, None] * group_size + head_in_group
    num_tile_pages = positions.max(axis=1) // PAGE_TOKENS + 1

    order = np.argsort(-num_tile_pages, kind="stable")
    groups = []
    for tiles in _groups(order, num_tile_pages, sizes.per_group):
        counts = num_tile_pages[tiles]
        tiles_with_page = [int(np.count_nonzero(counts > page)) for page in range(int(counts[0]))]
        item_page = np.repeat(np.arange(len(tiles_with_page)), tiles_with_page)
        item_tile = _ranges(np.array(tiles_with_page))
        plan_row = tile_row[tiles][item_tile]
        item_kv_tile = page_ids[first_pages[plan_row] + item_page] * num_kv_heads + tile_head[tiles][item_tile]
        num_padding = -len(item_tile) % sizes.per_call
        item_page, item_tile, item_kv_tile = (np.pad(a, (0, num_padding)) for a in (item_page, item_tile, item_kv_tile))
        last_visible = np.clip(positions[tiles][item_tile] - item_page[:, None] * PAGE_TOKENS, -1, PAGE_TOKENS - 1)
        real = np.flatnonzero(is_real[tiles])
        first_items = np.cumsum(tiles_with_page) - tiles_with_page
        groups.append(
            WorkItems(
                items_per_call=sizes.per_call,
                tile_rows=torch.from_numpy(query_rows[tiles].reshape(-1)).to(device),
                item_tiles=torch.from_numpy(item_tile).to(device),
                item_kv_tiles=torch.from_numpy(item_kv_tile).to(device),
                last_visible=torch.from_numpy(last_visible.astype(np.float32)).to(device),
                page_steps=tuple(
                    (int(first), count) for first, count in zip(first_items, tiles_with_page, strict=True)
                ),
                output_rows=torch.from_numpy(query_rows[tiles].reshape(-1)[real]).to(device),
                output_sources=torch.from_numpy(real).to(device),
            )
        )
    return tuple(groups)


def _ranges(counts: IntArray) -> IntArray:
    """0 .. count - 1 for each count, one after the other.

    >>> _ranges(np.array([2, 0, 3]))
    array([0, 1, 0, 1, 2])
    """
    firsts: IntArray = np.repeat(np.cumsum(counts) - counts, counts)
    return np.arange(len(firsts)) - firsts


def _groups(order: IntArray, num_tile_pages: IntArray, max_items: int) -> list[IntArray]:
    """Cut `order` so that each part has at most `max_items` items, or one tile."""
    parts, first, num_items = [], 0, 0
    for index, tile in enumerate(order):
        if index > first and num_items + num_tile_pages[tile] > max_items:
            parts.append(order[first:index])
            first, num_items = index, 0
        num_items += int(num_tile_pages[tile])
    parts.append(order[first:])
    return parts
