"""Attention by PyTorch's scaled_dot_product_attention, over keys and values gathered from their pages: for GPUs.

Its kernels, and with them the order of the additions, are picked by shape: a row's result may depend on what runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from backend.checkpoint import fp8
from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PAGE_TOKENS, PlanRow


@dataclass(frozen=True, slots=True)
class GatherSize:
    """`max_pages`: gathered at once, at least what the longest row has."""

    max_pages: int


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """Rows of a plan that attend in one call: S rows of one token each, or one row of any number of tokens; n tokens in all.

    `tokens` [n] int64: their places in the step. `tiles` [S, K, most pages] int64: tiles of KvPages, a row's own first one
    behind its last, because a key that is masked must still be a number. `is_seen` [S, 1, 1, num_keys] bool: the keys that
    each row's token sees; None for one row, whose tokens are the last of its `num_keys`.
    """

    tokens: torch.Tensor
    tiles: torch.Tensor
    num_keys: int
    is_seen: torch.Tensor | None


def gathered_page_bytes(config: ModelConfig, page_element_bytes: int) -> int:
    """What a page takes that is gathered: K and V of a layer as they are in it, and as they go into the product."""
    return 2 * PAGE_TOKENS * config.kv_size * (page_element_bytes + max(page_element_bytes, 2))


def group_rows(
    rows: tuple[PlanRow, ...], num_kv_heads: int, device: torch.device, size: GatherSize
) -> tuple[GatheredRows, ...]:
    """Cut the attention of a step into calls; tokens stand in the order of the rows."""
    first_tokens = np.cumsum([0, *(row.num_tokens for row in rows)])
    heads = np.arange(num_kv_heads)[:, None]
    groups = []
    for indices in _calls(rows, size.max_pages):
        ends = [rows[index].start + rows[index].num_tokens for index in indices]
        num_pages = -(-max(ends) // PAGE_TOKENS)
        pages = np.array([_padded(rows[index], num_pages) for index in indices], dtype=np.int64)
        tokens = [np.arange(first_tokens[index], first_tokens[index + 1]) for index in indices]
        is_seen = np.arange(num_pages * PAGE_TOKENS) < np.array(ends)[:, None]
        groups.append(
            GatheredRows(
                tokens=torch.from_numpy(np.concatenate(tokens)).to(device),
                tiles=torch.from_numpy(pages[:, None] * num_kv_heads + heads).to(device),
                num_keys=ends[0] if len(indices) == 1 else num_pages * PAGE_TOKENS,
                is_seen=None if len(indices) == 1 else torch.from_numpy(is_seen[:, None, None]).to(device),
            )
        )
    return tuple(groups)


def attend_gathered(
    queries: torch.Tensor, key_tiles: torch.Tensor, value_tiles: torch.Tensor, groups: Iterable[GatheredRows]
) -> torch.Tensor:
    """Causal softmax attention of all tokens of a step, with the arguments and the result of `attention.attend`.

    Products run in the pages' dtype, and in BF16 where that is FP8.
    """
    dtype = torch.bfloat16 if key_tiles.dtype == fp8.DTYPE else key_tiles.dtype
    result = torch.zeros_like(queries)
    for group in groups:
        keys, values = (_gathered(tiles, group).to(dtype) for tiles in (key_tiles, value_tiles))
        attended = _attend_group(queries.index_select(0, group.tokens).to(dtype), keys, values, group.is_seen)
        result.index_copy_(0, group.tokens, attended.float())
    return result


def _attend_group(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_seen: torch.Tensor | None
) -> torch.Tensor:
    """[n, H, D] of queries [n, H, D], keys and values [S, K, keys, D]."""
    if is_seen is None:
        # NOTE: importing this loads PyTorch's compiler, which takes two seconds and leaves a folder behind: on GPUs alone.
        from torch.nn.attention.bias import causal_lower_right

        return scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=causal_lower_right(len(queries), keys.shape[2]),
            scale=1.0,
            enable_gqa=True,
        )[0].transpose(0, 1)
    # The query heads of a KV head see the same keys: they go in as if they were tokens, so that no kernel must know of groups.
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=is_seen, scale=1.0).flatten(1, 2)


def _gathered(tiles: torch.Tensor, group: GatheredRows) -> torch.Tensor:
    """[S, K, num_keys, D] of tiles [num_pages * K, 64, D]."""
    taken = tiles.view(torch.uint8).index_select(0, group.tiles.flatten())  # bytes, because PyTorch indexes no FP8
    return taken.view(tiles.dtype).view(*group.tiles.shape[:2], -1, tiles.shape[2])[:, :, : group.num_keys]


def _calls(rows: tuple[PlanRow, ...], max_pages: int) -> Iterator[list[int]]:
    """Indices of the rows of each call: rows of one token by falling length, so that little of a call is padding."""
    single = sorted((i for i, row in enumerate(rows) if row.num_tokens == 1), key=lambda i: -rows[i].start)
    while single:
        most_pages = rows[single[0]].start // PAGE_TOKENS + 1
        num_rows = max_pages // most_pages
        assert num_rows > 0, f"a row of {most_pages} pages, expected at most {max_pages}"
        yield single[:num_rows]
        single = single[num_rows:]
    yield from ([index] for index, row in enumerate(rows) if row.num_tokens > 1)


def _padded(row: PlanRow, num_pages: int) -> tuple[int, ...]:
    pages = row.page_ids[: -(-(row.start + row.num_tokens) // PAGE_TOKENS)]
    return (*pages, *pages[:1] * (num_pages - len(pages)))
