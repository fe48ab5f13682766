"""Causal attention of the query tokens of prompts' chunks over paged KV: chunks of several sequences in one launch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap, int32
from kernels.contract import check_arguments, check_size
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled, unswizzled
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_MAX_GROUP = 8
_TILE_ROWS = 128
_KV_TOKENS = 128
_NUM_THREADS = 384
# Queries, and six tiles of K or V.
_SHARED_BYTES = 7 * 32 * 1024
# Rows of a tensor map's second dimension are counted in 32 bits.
_MAX_MAP_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of a prompt from position `start` on; `sequence` is its row of the page tables."""

    sequence: int
    start: int
    num_tokens: int


def tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Query tokens of a tile: with the heads of a KV head they make at most 128 rows. A power of two.

    >>> [tile_tokens(heads, 1) for heads in (1, 2, 3, 4, 8)]
    [128, 64, 32, 32, 16]
    """
    return 1 << ((_TILE_ROWS * num_kv_heads // num_heads).bit_length() - 1)


def max_tiles(num_tokens: int, num_chunks: int, num_heads: int, num_kv_heads: int) -> int:
    """Tiles of `num_chunks` chunks with `num_tokens` tokens together, at most: each may be cut at both its ends.

    >>> max_tiles(100, 1, 4, 1), max_tiles(2, 1, 4, 1), max_tiles(2, 2, 4, 1)
    (5, 2, 2)
    """
    tokens = tile_tokens(num_heads, num_kv_heads)
    return min(num_tokens, (num_tokens - num_chunks) // tokens + 2 * num_chunks)


def plan_tiles(chunks: Iterable[Chunk], num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Tiles [n, 4] INT32 for `prefill_attention`, the longest first; on the CPU, once a step for all layers.

    A tile has the tokens of a chunk between one multiple of `tile_tokens` and the next, so that a token's place in its
    tile follows from its position. Its row: sequence, the row of q where the sequence's position 0 would be (chunks lie
    behind one another in q, in their order), position of its first token, and the position behind the chunk's last.

    >>> plan_tiles([Chunk(sequence=7, start=60, num_tokens=10)], num_heads=4, num_kv_heads=1).tolist()
    [[7, -60, 64, 70], [7, -60, 60, 70]]
    """
    tokens = tile_tokens(num_heads, num_kv_heads)
    tiles, row = [], 0
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        positions = torch.arange(chunk.start // tokens * tokens, end, tokens, dtype=torch.int32)
        its_tiles = torch.tensor([chunk.sequence, row - chunk.start, 0, end], dtype=torch.int32).repeat(
            len(positions), 1
        )
        its_tiles[:, 2] = positions.clamp(min=chunk.start)
        tiles.append(its_tiles)
        row += chunk.num_tokens
    every = torch.cat(tiles) if tiles else torch.empty(0, 4, dtype=torch.int32)
    return every[torch.argsort(every[:, 2], descending=True, stable=True)]


def prefill_attention(
    device: Device,
    *,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out = softmax(q K^T / sqrt(128)) V over positions 0 to the row's own of its sequence, for each query head.

    q [T, H, 128] BF16: the chunks' tokens, one chunk behind the other. H a multiple of K, at most 8 K. k_pages, v_pages
    [P, K, 64, 128] BF16, swizzled as `kv_layout` says, with the chunks' own keys and values. page_tables [S, pages] INT32.
    tiles [n, 4] INT32, as `plan_tiles` made them, and num_tiles [1] INT32, how many there are. out [T, H 128] BF16: rows of
    no tile are left alone.

    A row's result depends, bit for bit, on its own query and position, and on keys and values up to there; what pages hold
    behind a chunk's last token has no influence, NaN included. ContractError.
    """
    others = (
        Buffer("page_tables", page_tables, Access.READ, "S pages", torch.int32),
        Buffer("tiles", tiles, Access.READ, "n 4", torch.int32),
        Buffer("num_tiles", num_tiles, Access.READ, "1", torch.int32),
        Buffer("out", out, Access.WRITE, "T width", torch.bfloat16),
    )
    queries = Buffer("q", q, Access.READ, "T H 128", torch.bfloat16)
    keys = Buffer("k_pages", k_pages, Access.READ, "P K 64 128", torch.bfloat16)
    values = Buffer("v_pages", v_pages, Access.READ, "P K 64 128", torch.bfloat16)
    sizes = check_arguments("prefill_attention", device, (queries, keys, values, *others))
    num_heads, num_kv_heads = sizes["H"], sizes["K"]
    check_size("prefill_attention", "T", sizes["T"], at_least=1)
    check_size("prefill_attention", "n", sizes["n"], at_least=1)
    check_size(
        "prefill_attention", "H", num_heads, multiple_of=num_kv_heads, at_least=1, at_most=_MAX_GROUP * num_kv_heads
    )
    check_size("prefill_attention", "width", sizes["width"], at_least=128 * num_heads, at_most=128 * num_heads)
    check_size("prefill_attention", "P", sizes["P"], at_most=_MAX_MAP_ROWS // (num_kv_heads * PAGE_TOKENS))
    device.launch(
        Launch(
            program(num_heads, num_kv_heads),
            "prefill_attention",
            grid=(min(sizes["n"] * num_kv_heads, device.num_sms), 1, 1),
            block=(_NUM_THREADS, 1, 1),
            shared_bytes=_SHARED_BYTES,
            arguments=(
                _query_map(queries, num_heads // num_kv_heads, tile_tokens(num_heads, num_kv_heads)),
                _page_map(keys),
                _page_map(values),
                *others,
                int32("most_tiles", sizes["n"]),
                int32("max_pages", sizes["pages"]),
            ),
            overlaps_previous=True,
        )
    )


def program(num_heads: int, num_kv_heads: int) -> Program:
    """The kernel for a model's heads."""
    return Program.of("prefill_attention", NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads)


def _query_map(buffer: Buffer, group: int, num_tokens: int) -> TensorMap:
    """Boxes of half the dimensions of a KV head's `group` query heads of `num_tokens` tokens; outside of q there are zeros."""
    assert buffer.tensor is not None
    num_rows, num_heads, _ = buffer.tensor.shape
    row_bytes = HEAD_DIM * 2
    return TensorMap(
        buffer,
        (HEAD_DIM, num_heads, num_rows),
        (row_bytes, num_heads * row_bytes),
        (HEAD_DIM // 2, group, num_tokens),
        Swizzle.BYTES_128,
    )


def _page_map(buffer: Buffer) -> TensorMap:
    """Boxes of 128 bytes of the 64 rows of a page and KV head, which are stored as the 128-byte swizzle would have them."""
    assert buffer.tensor is not None
    num_rows = buffer.tensor.numel() // HEAD_DIM
    row_bytes = HEAD_DIM * buffer.dtype.itemsize
    return TensorMap(buffer, (HEAD_DIM, num_rows), (row_bytes,), (128 // buffer.dtype.itemsize, PAGE_TOKENS))


def prefill_attention_reference(
    *,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    out: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """In FP64."""
    y, _ = _attended(q, k_pages, v_pages, page_tables, tiles)
    return {"out": y}


def _attended(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_tables: torch.Tensor, tiles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [T, H 128] in FP64, and how far the kernel's roundings may move each.

    A score is a sum of 128 products in FP32: it may lose 128 * 2^-24 of the sum of |q k|, and its exponent as much again
    (scaling, subtraction, exp2 within 2 ulp). A weight is rounded to BF16 (2^-8). The sums over the row lose 2^-24 per
    token at most, once above, once below.
    """
    num_rows, num_heads, _ = q.shape
    num_kv_heads = k_pages.shape[1]
    tokens = tile_tokens(num_heads, num_kv_heads)
    keys, values = (unswizzled(pages).double() for pages in (k_pages, v_pages))
    out, moved = torch.zeros(2, num_rows, num_heads, HEAD_DIM, dtype=torch.float64)
    for sequence, row_of_position_0, position, length in tiles.tolist():
        end = min(length, (position // tokens + 1) * tokens)
        rows = slice(row_of_position_0 + position, row_of_position_0 + end)
        pages = page_tables[sequence, : -(-end // PAGE_TOKENS)].long()
        k, v = (kept[pages].transpose(1, 2).reshape(-1, num_kv_heads, HEAD_DIM)[:end] for kept in (keys, values))
        query = q[rows].double().unflatten(1, (num_kv_heads, -1)) / math.sqrt(HEAD_DIM)
        is_seen = torch.arange(end) <= torch.arange(position, end)[:, None]
        scores = torch.einsum("tkgd,lkd->kgtl", query, k).where(is_seen, -math.inf)
        weights = scores.softmax(dim=-1)
        magnitude = torch.einsum("tkgd,lkd->kgtl", query.abs(), k.abs()).where(is_seen, 0.0).amax(dim=-1, keepdim=True)
        lost = 2 * magnitude * HEAD_DIM * 2.0**-23 + 2.0**-8 + 2 * end * 2.0**-24
        out[rows] = torch.einsum("kgtl,lkd->tkgd", weights, v).flatten(1, 2)
        spread = torch.einsum("kgtl,lkd->tkgd", weights * torch.expm1(lost), v.abs()).flatten(1, 2)
        moved[rows] = spread + out[rows].abs() * (2 * end * 2.0**-24)
    return out.flatten(1), moved.flatten(1)


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """What scores, weights and sums lose, and half a unit of the output format where the value then is."""
    _, moved = _attended(*(inputs[name] for name in ("q", "k_pages", "v_pages", "page_tables", "tiles")))
    return {"out": moved + (expected["out"].abs() + moved) * 2.0**-8}


_NEMO = {"H": 32, "K": 8}
CASES = (
    Case("NeMo, 8K", _NEMO, {"chunks": ((0, 8192),)}, is_emulated=False, is_timed=True),
    Case("NeMo heads", _NEMO, {"chunks": ((0, 20),)}),
    Case("one token", {"H": 4, "K": 1}, {"chunks": ((0, 1),)}),
    Case("three tiles of keys", {"H": 4, "K": 1}, {"chunks": ((250, 60),)}),
    Case("chunks of every kind", {"H": 4, "K": 1}, {"chunks": ((0, 33), (64, 32), (127, 2), (200, 1), (96, 40))}),
    Case("one query head a KV head", {"H": 2, "K": 2}, {"chunks": ((100, 60),)}),
    Case("two query heads a KV head", {"H": 2, "K": 1}, {"chunks": ((190, 10),)}),
    Case("three query heads a KV head", {"H": 3, "K": 1}, {"chunks": ((120, 20),)}),
    Case("eight query heads a KV head", {"H": 8, "K": 1}, {"chunks": ((10, 30),)}),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Inputs:
    """Chunks of different sequences as (start, number of tokens); pages lie anywhere, and behind a chunk there is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = case.sizes["H"], case.sizes["K"]
    dtype = torch.bfloat16
    ends = [start + num_tokens for start, num_tokens in case.options["chunks"]]
    num_sequences, max_pages = len(ends), -(-max(ends) // PAGE_TOKENS)
    num_pages = num_sequences * max_pages + 1
    page_tables = torch.randperm(num_pages, generator=generator)[:-1].view(num_sequences, max_pages)
    shape = (num_pages, num_kv_heads, PAGE_TOKENS, HEAD_DIM)
    k_pages, v_pages = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    sequences = torch.randperm(num_sequences, generator=generator).tolist()
    chunks = []
    for sequence, (start, num_tokens) in zip(sequences, case.options["chunks"], strict=True):
        end = start + num_tokens
        for index in range(end // PAGE_TOKENS, max_pages):
            for pages in (k_pages, v_pages):
                pages.view(torch.uint8)[page_tables[sequence, index], :, max(0, end - index * PAGE_TOKENS) :] = 0xFF
        chunks.append(Chunk(sequence, start, num_tokens))
    tiles = plan_tiles(chunks, num_heads, num_kv_heads)
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    return {
        "q": (2 * torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator)).bfloat16(),
        "k_pages": swizzled(k_pages),
        "v_pages": swizzled(v_pages),
        "page_tables": page_tables.int(),
        "tiles": tiles,
        "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32),
        "out": torch.empty(num_tokens, num_heads * HEAD_DIM, dtype=torch.bfloat16),
    }


def cost(case: Case) -> Cost:
    """Scores and sums below the diagonal; keys and values once, queries and results once."""
    num_heads, num_kv_heads = case.sizes["H"], case.sizes["K"]
    pairs = sum(tokens * start + tokens * (tokens + 1) // 2 for start, tokens in case.options["chunks"])
    kept = sum(start + tokens for start, tokens in case.options["chunks"]) * 2 * num_kv_heads * HEAD_DIM * 2
    around = sum(tokens for _, tokens in case.options["chunks"]) * num_heads * HEAD_DIM * 4
    return Cost(flops=4 * pairs * num_heads * HEAD_DIM, bytes=kept + around)


OP = Op(
    name="prefill_attention",
    formula="out = softmax(q K^T / sqrt(128)) V over pages, causal, chunks of many query tokens",
    launch=prefill_attention,
    make_inputs=make_inputs,
    reference=prefill_attention_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=(program(32, 8),),
    outputs=("out",),
    instructions=("HGMMA", "UTMALDG.2D", "UTMALDG.3D"),
)
