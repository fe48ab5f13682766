"""Attention of single query tokens over paged KV: a schedule for the step, partial results of chunks, and their merge."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer, int32
from kernels.attention_reference import attended, expected_outputs, kept_values, output_bounds
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled
from kernels.launch import Device, Launch, Program
from kernels.op import HALF_FLOP_PER_US, Case, Cost, Inputs, Op

MIN_CHUNK_PAGES = 4
MAX_CHUNKS = 64
MAX_ROWS = 1024
_MAX_GROUP = 8
_MAX_CLUSTER_BLOCKS = 8
_SCHEDULE_THREADS = 1024
_PARTIALS_THREADS = 160
_MERGE_PARTS = 4
# 96 KB of K and V tiles in either dtype. Two blocks fit into an SM, by registers (168 x 160) and by shared memory.
_RING_BYTES = 96 * 1024
_BLOCKS_PER_SM = 2


def chunk_pages(num_pages: int) -> int:
    """Pages of a chunk of a row that has `num_pages`: 4, 8, 16, ..., so that it has at most 64 chunks.

    >>> [chunk_pages(num_pages) for num_pages in (1, 256, 257, 2048)]
    [4, 4, 8, 32]
    """
    pages = MIN_CHUNK_PAGES
    while pages * MAX_CHUNKS < num_pages:
        pages *= 2
    return pages


def make_workspace(num_rows: int, max_pages: int, num_heads: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What `schedule_attention` and `decode_attention` share, by the names of their arguments, for up to `num_rows` rows.

    `max_pages` are the most that a row has. items [n, 2], first_items [num_rows + 1] INT32: written by the schedule, read
    by every layer. sums [n, H, 128], stats [n, H, 2] FP32: nothing between calls. n is `max_items`.
    """
    num_items = max_items(num_rows, max_pages)
    return {
        "items": torch.zeros(num_items, 2, dtype=torch.int32, device=device),
        "first_items": torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
        "sums": torch.zeros(num_items, num_heads, HEAD_DIM, device=device),
        "stats": torch.zeros(num_items, num_heads, 2, device=device),
    }


def max_items(num_rows: int, max_pages: int) -> int:
    """Chunks of `num_rows` rows, of at most `max_pages` pages each, at most."""
    return num_rows * min(MAX_CHUNKS, -(-max_pages // MIN_CHUNK_PAGES))


def schedule_attention(
    device: Device, *, lengths: torch.Tensor, items: torch.Tensor, first_items: torch.Tensor, num_rows: torch.Tensor
) -> None:
    """Lists the chunks of all rows, once per step, for `decode_attention` of every layer.

    lengths [T] INT32, T at most 1,024: keys the row sees (position + 1), 0 for none. items [n, 2] INT32: row and chunk, and
    first_items [T + 1] INT32: where a row's items begin, and how many there are. num_rows [1] INT32: rows from there on
    have no keys. ContractError.
    """
    buffers = (
        Buffer("lengths", lengths, Access.READ, "T", torch.int32),
        Buffer("items", items, Access.WRITE, "n 2", torch.int32),
        Buffer("first_items", first_items, Access.WRITE, "T+1", torch.int32),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("schedule_attention", device, buffers)
    check_size("schedule_attention", "T", sizes["T"], at_least=1, at_most=MAX_ROWS)
    check_size("schedule_attention", "T+1", sizes["T+1"], at_least=sizes["T"] + 1, at_most=sizes["T"] + 1)
    device.launch(
        Launch(
            program(1, 1, is_fp8=False, output=0),
            "attention_schedule",
            grid=(1, 1, 1),
            block=(_SCHEDULE_THREADS, 1, 1),
            arguments=(*buffers, int32("most_rows", sizes["T"])),
            overlaps_previous=True,
        )
    )


def decode_attention(
    device: Device,
    *,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    items: torch.Tensor,
    first_items: torch.Tensor,
    sums: torch.Tensor,
    stats: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
) -> None:
    """out = softmax(q K^T / sqrt(128)) V over positions 0 to length - 1 of the row's sequence, for each query head.

    q [T, H, 128] BF16, T at most 1,024; H a multiple of K, at most 8 K. k_pages, v_pages [P, K, 64, 128], swizzled as
    `kv_layout` says: BF16, or e4m3 with k_scale and v_scale [1] FP32, constant (real value = code x scale). sequences [T]
    INT32: rows of page_tables [S, pages] INT32. lengths [T] INT32, and items and first_items as `schedule_attention` made
    them of these lengths and its number of rows. sums, stats: see `make_workspace`.
    out [T, H 128]: BF16 without scales; e4m3 with `scale` [T] FP32, which receives max |out| / 448 of each row (K at most
    8); or e4m3 with `static_scale` [1] FP32, constant. Rows without keys get zeros, rows beyond the schedule's among them.

    A row's result depends, bit for bit, on its own query, length, keys and values; what pages hold behind the length has
    no influence, NaN included. ContractError.
    """
    is_fp8 = k_pages.dtype == torch.float8_e4m3fn
    if (k_scale is not None) != is_fp8 or (v_scale is not None) != is_fp8:
        raise ContractError(
            f"decode_attention: expected k_scale and v_scale {'both' if is_fp8 else 'not'} with pages of {k_pages.dtype}"
        )
    if scale is not None and static_scale is not None:
        raise ContractError("decode_attention: scale and static_scale are both given, expected at most one")
    output = 1 if scale is not None else 2 if static_scale is not None else 0
    page_dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    rows = (
        Buffer("q", q, Access.READ, "T H 128", torch.bfloat16),
        Buffer("k_pages", k_pages, Access.READ, "P K 64 128", page_dtype),
        Buffer("v_pages", v_pages, Access.READ, "P K 64 128", page_dtype),
        Buffer("k_scale", k_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("page_tables", page_tables, Access.READ, "S pages", torch.int32),
        Buffer("sequences", sequences, Access.READ, "T", torch.int32),
        Buffer("lengths", lengths, Access.READ, "T", torch.int32),
        Buffer("items", items, Access.READ, "n 2", torch.int32),
        Buffer("first_items", first_items, Access.READ, "T+1", torch.int32),
    )
    partials = (
        Buffer("sums", sums, Access.WRITE, "n H 128", torch.float32),
        Buffer("stats", stats, Access.WRITE, "n H 2", torch.float32),
    )
    results = (
        Buffer("v_scale", v_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("static_scale", static_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("out", out, Access.WRITE, "T width", torch.float8_e4m3fn if output else torch.bfloat16),
        Buffer("scale", scale, Access.WRITE, "T", torch.float32),
    )
    sizes = check_arguments("decode_attention", device, (*rows, *partials, *results))
    num_rows, num_heads, num_kv_heads = sizes["T"], sizes["H"], sizes["K"]
    group = num_heads // num_kv_heads
    check_size("decode_attention", "T", num_rows, at_least=1, at_most=MAX_ROWS)
    check_size("decode_attention", "T+1", sizes["T+1"], at_least=num_rows + 1, at_most=num_rows + 1)
    check_size(
        "decode_attention", "H", num_heads, multiple_of=num_kv_heads, at_least=1, at_most=_MAX_GROUP * num_kv_heads
    )
    check_size("decode_attention", "width", sizes["width"], at_least=128 * num_heads, at_most=128 * num_heads)
    check_size("decode_attention", "n", sizes["n"], at_least=max_items(num_rows, sizes["pages"]))
    if output == 1:
        check_size("decode_attention", "K with a scale per row", num_kv_heads, at_most=_MAX_CLUSTER_BLOCKS)
    its_program = program(num_heads, num_kv_heads, is_fp8=is_fp8, output=output)
    device.launch(
        Launch(
            its_program,
            "attention_partials",
            grid=(min(sizes["n"] * num_kv_heads, device.num_sms * _BLOCKS_PER_SM), 1, 1),
            block=(_PARTIALS_THREADS, 1, 1),
            shared_bytes=_RING_BYTES,
            arguments=(*rows, *partials, int32("most_rows", num_rows), int32("max_pages", sizes["pages"])),
            overlaps_previous=True,
        )
    )
    merged = tuple(Buffer(b.name, b.tensor, Access.READ, b.shape, b.dtype) for b in (*partials, rows[-1]))
    device.launch(
        Launch(
            its_program,
            "attention_merge",
            grid=(num_rows, num_kv_heads, 1),
            block=(32 * group * _MERGE_PARTS, 1, 1),
            cluster=(1, num_kv_heads if output == 1 else 1, 1),
            arguments=(*merged, *results),
            overlaps_previous=True,
        )
    )


def program(num_heads: int, num_kv_heads: int, *, is_fp8: bool, output: int) -> Program:
    """The kernels for a model's heads and KV dtype; `output` 0: BF16, 1: e4m3 and a scale per row, 2: e4m3, given scale."""
    return Program.of(
        "decode_attention", NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, FP8_KV=int(is_fp8), OUTPUT=output
    )


def decode_attention_reference(
    *,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """In FP64; e4m3 outputs unrounded."""
    y, _ = _attended(q, k_pages, v_pages, k_scale, v_scale, page_tables, sequences, lengths)
    return expected_outputs(y, scale, static_scale)


def _attended(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    page_tables: torch.Tensor,
    sequences: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [T, H 128] in FP64, and how far the kernel's roundings may move each.

    Weights are rounded to BF16 (2^-8) or FP16 (2^-11, but at least 2^-25 where they are small).
    """
    weight_error, smallest_error = (2.0**-8, 0.0) if k_scale is None else (2.0**-11, 2.0**-25)
    keys, values = kept_values(k_pages, k_scale), kept_values(v_pages, v_scale)
    out, moved = torch.zeros(2, *q.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        if length:
            page_ids = page_tables[int(sequences[row])]
            its_row = slice(row, row + 1)
            out[its_row], moved[its_row] = attended(
                q[its_row], keys, values, page_ids, length - 1, weight_error, smallest_error
            )
    return out.flatten(1), moved.flatten(1)


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """What scores, weights and sums lose, and half a unit of the output format where the value then is."""
    names = ("q", "k_pages", "v_pages", "k_scale", "v_scale", "page_tables", "sequences", "lengths")
    _, moved = _attended(*(inputs[name] for name in names))
    return output_bounds(inputs, expected, moved)


_NEMO = {"H": 32, "K": 8}
CASES = (
    Case("NeMo, 64 at 4K", _NEMO | {"T": 64, "length": 4096}, {"full": True}, is_emulated=False, is_timed=True),
    Case("NeMo, FP8, 64 at 4K", _NEMO | {"T": 64, "length": 4096}, {"fp8": True, "output": 1, "full": True},
         is_emulated=False, is_timed=True),
    Case("NeMo, FP8, 1 at 128K", _NEMO | {"T": 1, "length": 131072}, {"fp8": True, "output": 1, "full": True},
         is_emulated=False, is_timed=True),
    Case("NeMo heads", _NEMO | {"T": 2, "length": 70}, {"output": 1}),
    Case("NeMo heads, FP8", _NEMO | {"T": 2, "length": 130}, {"fp8": True, "output": 1}),
    Case("all of one length", {"T": 2, "H": 4, "K": 1, "length": 128}, {"full": True}),
    Case("lengths of every kind", {"T": 7, "H": 4, "K": 1, "length": 600}),
    Case("lengths of every kind, FP8", {"T": 7, "H": 4, "K": 1, "length": 600}, {"fp8": True, "output": 2}),
    Case("longer chunks", {"T": 1, "H": 1, "K": 1, "length": 16500}, {"fp8": True, "full": True}),
    Case("one query head a KV head", {"T": 2, "H": 3, "K": 3, "length": 65}),
    Case("eight query heads a KV head", {"T": 2, "H": 8, "K": 1, "length": 65}, {"fp8": True, "output": 1}),
    Case("three query heads a KV head", {"T": 3, "H": 6, "K": 2, "length": 64}, {"output": 2}),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Inputs:
    """Rows of different lengths up to the case's; pages lie anywhere, and behind a row's last key there is NaN.

    The first rows have the whole length, nothing, one key, a page, a chunk, a chunk and a key; others are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_heads, num_kv_heads, length = (case.sizes[name] for name in ("T", "H", "K", "length"))
    is_fp8, output = case.options.get("fp8", False), case.options.get("output", 0)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    lengths = torch.randint(1, length + 1, (num_rows,), generator=generator)
    chunk = MIN_CHUNK_PAGES * PAGE_TOKENS
    for row, fixed in enumerate((length, 0, 1, PAGE_TOKENS, chunk, chunk + 1)[:num_rows]):
        lengths[row] = min(fixed, length)
    if case.options.get("full", False):
        lengths.fill_(length)
    max_pages = -(-length // PAGE_TOKENS)
    num_pages = num_rows * max_pages + 1
    page_tables = torch.randperm(num_pages, generator=generator)[: num_rows * max_pages].view(num_rows, max_pages)
    shape = (num_pages, num_kv_heads, PAGE_TOKENS, HEAD_DIM)
    k_pages, v_pages = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    sequences = torch.randperm(num_rows, generator=generator)
    for row, sequence in enumerate(sequences.tolist()):
        for index in range(int(lengths[row]) // PAGE_TOKENS, max_pages):
            behind = max(0, int(lengths[row]) - index * PAGE_TOKENS)
            for pages in (k_pages, v_pages):
                pages.view(torch.uint8)[page_tables[sequence, index], :, behind:] = 0xFF
    return {
        "q": (2 * torch.randn(num_rows, num_heads, HEAD_DIM, generator=generator)).bfloat16(),
        "k_pages": swizzled(k_pages),
        "v_pages": swizzled(v_pages),
        "k_scale": torch.tensor([0.7]) if is_fp8 else None,
        "v_scale": torch.tensor([1.3]) if is_fp8 else None,
        "page_tables": page_tables.int(),
        "sequences": sequences.int(),
        "lengths": lengths.int(),
        "out": torch.empty(num_rows, num_heads * HEAD_DIM, dtype=torch.float8_e4m3fn if output else torch.bfloat16),
        "scale": torch.empty(num_rows) if output == 1 else None,
        "static_scale": torch.tensor([0.01]) if output == 2 else None,
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
    }


def schedule_and_attend(
    device: Device, *, lengths: torch.Tensor, num_rows: torch.Tensor, page_tables: torch.Tensor, **others: torch.Tensor
) -> None:
    """A step of one layer, with a workspace of its own: for checks."""
    work = make_workspace(len(lengths), page_tables.shape[1], others["q"].shape[1], device.torch_device)
    schedule_attention(device, lengths=lengths, items=work["items"], first_items=work["first_items"], num_rows=num_rows)
    decode_attention(device, lengths=lengths, page_tables=page_tables, **others, **work)


def cost(case: Case) -> Cost:
    """Keys and values once, queries and results once."""
    num_rows, num_heads, num_kv_heads, length = (case.sizes[name] for name in ("T", "H", "K", "length"))
    kept = 2 * num_rows * length * num_kv_heads * HEAD_DIM * (1 if case.options.get("fp8") else 2)
    around = num_rows * num_heads * HEAD_DIM * (2 + (1 if case.options.get("output") else 2))
    return Cost(flops=4 * num_rows * length * num_heads * HEAD_DIM, bytes=kept + around, flop_per_us=HALF_FLOP_PER_US)


OP = Op(
    name="decode_attention",
    formula="out = softmax(q K^T / sqrt(128)) V over pages, one query token a row",
    launch=schedule_and_attend,
    make_inputs=make_inputs,
    reference=decode_attention_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=(
        program(1, 1, is_fp8=False, output=0),
        *(program(32, 8, is_fp8=is_fp8, output=output) for is_fp8 in (False, True) for output in (0, 1, 2)),
    ),
    outputs=("out", "scale"),
    rows=("q", "sequences", "lengths", "out", "scale"),
    instructions=("UBLKCP", "HMMA"),
)
