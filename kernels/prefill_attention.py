"""Causal attention of the query tokens of prompts' chunks over paged KV: chunks of several sequences in one launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap, int32
from kernels.attention_reference import attended, expected_outputs, kept_values, output_bounds
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled
from kernels.launch import Device, Launch, Program
from kernels.op import HALF_FLOP_PER_US, Case, Cost, Inputs, Op

_MAX_GROUP = 8
_TILE_ROWS = 128
_KV_TOKENS = 128
_NUM_THREADS = 384
_QUANTISE_THREADS = 256
# Queries, and six tiles of K or V, or four in FP16 and four in e4m3.
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
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    unscaled: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
) -> None:
    """out = softmax(q K^T / sqrt(128)) V over positions 0 to the row's own of its sequence, for each query head.

    q [T, H, 128] BF16: the chunks' tokens, one chunk behind the other. H a multiple of K, at most 8 K. k_pages, v_pages
    [P, K, 64, 128], swizzled as `kv_layout` says, with the chunks' own keys and values: BF16, or e4m3 with k_scale and
    v_scale [1] FP32, constant (real value = code x scale). page_tables [S, pages] INT32. tiles [n, 4] INT32, as
    `plan_tiles` made them, and num_tiles [1] INT32, how many there are.
    out [T, H 128]: BF16 without scales; e4m3 with `static_scale` [1] FP32, constant; or e4m3 with `scale` [T] FP32, which
    receives max |out| / 448 of each row, and `unscaled` [T, H 128] BF16, which is written in between. Rows of no tile are
    left alone in all of them.

    A row's result depends, bit for bit, on its own query and position, and on keys and values up to there; what pages hold
    behind a chunk's last token has no influence, NaN included. ContractError.
    """
    is_fp8 = k_pages.dtype == torch.float8_e4m3fn
    if (k_scale is not None) != is_fp8 or (v_scale is not None) != is_fp8:
        raise ContractError(
            f"prefill_attention: expected k_scale and v_scale {'both' if is_fp8 else 'not'} with pages of {k_pages.dtype}"
        )
    if scale is not None and static_scale is not None:
        raise ContractError("prefill_attention: scale and static_scale are both given, expected at most one")
    if (unscaled is not None) != (scale is not None):
        raise ContractError("prefill_attention: unscaled and scale must both be given, or none of them")
    output = 1 if scale is not None else 2 if static_scale is not None else 0
    page_dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    queries = Buffer("q", q, Access.READ, "T H 128", torch.bfloat16)
    keys = Buffer("k_pages", k_pages, Access.READ, "P K 64 128", page_dtype)
    values = Buffer("v_pages", v_pages, Access.READ, "P K 64 128", page_dtype)
    places = (
        Buffer("tiles", tiles, Access.READ, "n 4", torch.int32),
        Buffer("num_tiles", num_tiles, Access.READ, "1", torch.int32),
    )
    others = (
        Buffer("k_scale", k_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("v_scale", v_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("page_tables", page_tables, Access.READ, "S pages", torch.int32),
        *places,
        Buffer("static_scale", static_scale, Access.CONSTANT, "1", torch.float32),
    )
    result = Buffer("out", out, Access.WRITE, "T width", torch.float8_e4m3fn if output else torch.bfloat16)
    attended = Buffer("unscaled", unscaled, Access.WRITE, "T width", torch.bfloat16)
    row_scale = Buffer("scale", scale, Access.WRITE, "T", torch.float32)
    sizes = check_arguments("prefill_attention", device, (queries, keys, values, *others, result, attended, row_scale))
    num_heads, num_kv_heads = sizes["H"], sizes["K"]
    check_size("prefill_attention", "T", sizes["T"], at_least=1)
    check_size("prefill_attention", "n", sizes["n"], at_least=1)
    check_size(
        "prefill_attention", "H", num_heads, multiple_of=num_kv_heads, at_least=1, at_most=_MAX_GROUP * num_kv_heads
    )
    check_size("prefill_attention", "width", sizes["width"], at_least=128 * num_heads, at_most=128 * num_heads)
    check_size("prefill_attention", "P", sizes["P"], at_most=_MAX_MAP_ROWS // (num_kv_heads * PAGE_TOKENS))
    its_program = program(num_heads, num_kv_heads, is_fp8=is_fp8, output=output)
    tokens = tile_tokens(num_heads, num_kv_heads)
    most_tiles = int32("most_tiles", sizes["n"])
    device.launch(
        Launch(
            its_program,
            "prefill_attention",
            grid=(min(sizes["n"] * num_kv_heads, device.num_sms), 1, 1),
            block=(_NUM_THREADS, 1, 1),
            shared_bytes=_SHARED_BYTES,
            arguments=(
                _query_map(queries, num_heads // num_kv_heads, tokens),
                _page_map(keys),
                _page_map(values),
                *others,
                attended if output == 1 else result,
                most_tiles,
                int32("max_pages", sizes["pages"]),
            ),
            overlaps_previous=True,
        )
    )
    if output == 1:
        device.launch(
            Launch(
                its_program,
                "prefill_quantise",
                grid=(sizes["n"] * tokens, 1, 1),
                block=(_QUANTISE_THREADS, 1, 1),
                arguments=(replace(attended, access=Access.READ), *places, result, row_scale, most_tiles),
                overlaps_previous=True,
            )
        )


def program(num_heads: int, num_kv_heads: int, *, is_fp8: bool, output: int) -> Program:
    """The kernels for a model's heads and KV dtype; `output` 0: BF16, 1: e4m3 and a scale per row, 2: e4m3, given scale."""
    return Program.of(
        "prefill_attention", NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, FP8_KV=int(is_fp8), OUTPUT=output
    )


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
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    unscaled: torch.Tensor | None,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """In FP64; e4m3 outputs unrounded."""
    y, _ = _attended(q, k_pages, v_pages, k_scale, v_scale, page_tables, tiles)
    return expected_outputs(y, scale, static_scale) | ({} if scale is None else {"unscaled": y})


def _attended(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    tiles: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [T, H 128] in FP64, and how far the kernel's roundings may move each.

    Weights are rounded to BF16 (2^-8) or FP16 (2^-11, but at least 2^-25 where they are small).
    """
    tokens = tile_tokens(q.shape[1], k_pages.shape[1])
    weight_error, smallest_error = (2.0**-8, 0.0) if k_scale is None else (2.0**-11, 2.0**-25)
    keys, values = kept_values(k_pages, k_scale), kept_values(v_pages, v_scale)
    out, moved = torch.zeros(2, *q.shape, dtype=torch.float64)
    for sequence, row_of_position_0, position, length in tiles.tolist():
        end = min(length, (position // tokens + 1) * tokens)
        rows = slice(row_of_position_0 + position, row_of_position_0 + end)
        out[rows], moved[rows] = attended(
            q[rows], keys, values, page_tables[sequence], position, weight_error, smallest_error
        )
    return out.flatten(1), moved.flatten(1)


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """What scores, weights and sums lose, and half a unit of the output format where the value then is."""
    names = ("q", "k_pages", "v_pages", "k_scale", "v_scale", "page_tables", "tiles")
    y, moved = _attended(*(inputs[name] for name in names))
    if inputs["scale"] is None:
        return output_bounds(inputs, expected, moved)
    of_unscaled = moved + (y.abs() + moved) * 2.0**-8
    return output_bounds(inputs, expected, of_unscaled) | {"unscaled": of_unscaled}


_NEMO = {"H": 32, "K": 8}
CASES = (
    Case("NeMo, 8K", _NEMO, {"chunks": ((0, 8192),)}, is_emulated=False, is_timed=True),
    Case("NeMo, FP8, 8K", _NEMO, {"chunks": ((0, 8192),), "fp8": True, "output": 1}, is_emulated=False, is_timed=True),
    Case("NeMo, FP8, 2K behind 30K", _NEMO, {"chunks": ((30720, 2048),), "fp8": True, "output": 1},
         is_emulated=False, is_timed=True),
    Case("NeMo, 16 of 512", _NEMO, {"chunks": ((0, 512),) * 16}, is_emulated=False, is_timed=True),
    Case("NeMo, at 128K", _NEMO, {"chunks": ((131072 - 40, 40),)}, is_emulated=False),
    Case("NeMo, FP8, at 128K", _NEMO, {"chunks": ((131072 - 40, 40),), "fp8": True}, is_emulated=False),
    Case("NeMo heads", _NEMO, {"chunks": ((0, 3),), "output": 1}),
    Case("NeMo heads, FP8", _NEMO, {"chunks": ((30, 4),), "fp8": True, "output": 1}),
    Case("one token", {"H": 4, "K": 1}, {"chunks": ((0, 1),)}),
    Case("slots used again", {"H": 4, "K": 1}, {"chunks": ((636, 10),)}),
    Case("slots used again, FP8", {"H": 4, "K": 1}, {"chunks": ((500, 20),), "fp8": True, "output": 2}),
    Case("chunks of every kind", {"H": 4, "K": 1}, {"chunks": ((0, 33), (64, 32), (127, 2), (200, 1), (96, 40))}),
    Case("chunks of every kind, FP8", {"H": 4, "K": 1}, {"chunks": ((0, 33), (64, 32), (127, 2), (200, 1)), "fp8": True}),
    Case("several tiles a block", {"H": 4, "K": 1}, {"chunks": ((510, 3),) * 12}),
    Case("one query head a KV head", {"H": 2, "K": 2}, {"chunks": ((100, 60),), "output": 2}),
    Case("two query heads a KV head", {"H": 2, "K": 1}, {"chunks": ((190, 10),), "fp8": True}),
    Case("three query heads a KV head", {"H": 3, "K": 1}, {"chunks": ((120, 20),)}),
    Case("eight query heads a KV head", {"H": 8, "K": 1}, {"chunks": ((10, 30),), "output": 1}),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Inputs:
    """Chunks of different sequences as (start, number of tokens); pages lie anywhere, and behind a chunk there is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = case.sizes["H"], case.sizes["K"]
    is_fp8, output = case.options.get("fp8", False), case.options.get("output", 0)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
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
        "k_scale": torch.tensor([0.7]) if is_fp8 else None,
        "v_scale": torch.tensor([1.3]) if is_fp8 else None,
        "page_tables": page_tables.int(),
        "tiles": tiles,
        "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32),
        "unscaled": torch.empty(num_tokens, num_heads * HEAD_DIM, dtype=torch.bfloat16) if output == 1 else None,
        "out": torch.empty(num_tokens, num_heads * HEAD_DIM, dtype=torch.float8_e4m3fn if output else torch.bfloat16),
        "scale": torch.empty(num_tokens) if output == 1 else None,
        "static_scale": torch.tensor([0.01]) if output == 2 else None,
    }


def cost(case: Case) -> Cost:
    """Scores and sums below the diagonal; keys and values once, queries and results once."""
    num_heads, num_kv_heads = case.sizes["H"], case.sizes["K"]
    chunks = case.options["chunks"]
    pairs = sum(num_tokens * start + num_tokens * (num_tokens + 1) // 2 for start, num_tokens in chunks)
    kept = 2 * sum(start + num_tokens for start, num_tokens in chunks) * num_kv_heads * HEAD_DIM
    around = sum(num_tokens for _, num_tokens in chunks) * num_heads * HEAD_DIM
    kv_bytes, out_bytes = 1 if case.options.get("fp8") else 2, 1 if case.options.get("output") else 2
    return Cost(
        flops=4 * pairs * num_heads * HEAD_DIM,
        bytes=kept * kv_bytes + around * (2 + out_bytes),
        flop_per_us=HALF_FLOP_PER_US,
    )


OP = Op(
    name="prefill_attention",
    formula="out = softmax(q K^T / sqrt(128)) V over pages, causal, chunks of many query tokens",
    launch=prefill_attention,
    make_inputs=make_inputs,
    reference=prefill_attention_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=tuple(program(32, 8, is_fp8=is_fp8, output=output) for is_fp8 in (False, True) for output in (0, 1, 2)),
    outputs=("out", "scale", "unscaled"),
    instructions=("HGMMA", "UTMALDG.2D", "UTMALDG.3D"),
)
