"""Rotary position embedding of Q and K, and the write of K and V into their pages."""

from __future__ import annotations

import numpy as np
import torch

from kernels.arguments import Access, Buffer, int32
from kernels.contract import check_arguments, check_size
from kernels.e4m3 import code_bounds
from kernels.errors import ContractError
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, stored_dimensions
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_NUM_THREADS = 256
_THREADS_PER_HEAD = 8


def rope_kv(
    device: Device,
    *,
    qkv: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    sequences: torch.Tensor,
    page_tables: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    num_tokens: torch.Tensor,
    is_interleaved: bool,
) -> None:
    """Turn Q and K of each token by the angles of its position; write Q to q, K and V to the token's row of its page.

    qkv [T, H + 2K, 128] BF16: Q, K and V heads. angles [positions, 2, 64] FP32, constant: cosines, then sines (see
    `angle_table`). positions [T] INT32, -1 for a token to skip. sequences [T] INT32: rows of page_tables [S, pages]
    INT32, whose entry position // 64 is the token's page. q [T, H, 128] BF16.
    k_pages, v_pages [P, K, 64, 128], updated, swizzled as `kv_layout` says: BF16, or e4m3 with k_scale and v_scale [1]
    FP32, constant (real value = code x scale). num_tokens [1] INT32: tokens from there on are left alone.
    `is_interleaved`: pairs are dimensions 2i and 2i + 1 (Mistral's consolidated files), not i and i + 64.

    A page id or position outside its table is not noticed. ContractError.
    """
    is_fp8 = k_pages.dtype == torch.float8_e4m3fn
    if (k_scale is not None) != is_fp8 or (v_scale is not None) != is_fp8:
        raise ContractError(
            f"rope_kv: k_scale and v_scale are {'given' if not is_fp8 else 'not both given'}, "
            f"expected {'both' if is_fp8 else 'neither'} with pages of {k_pages.dtype}"
        )
    page_dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    buffers = (
        Buffer("qkv", qkv, Access.READ, "T heads 128", torch.bfloat16),
        Buffer("angles", angles, Access.CONSTANT, "positions 2 64", torch.float32),
        Buffer("positions", positions, Access.READ, "T", torch.int32),
        Buffer("sequences", sequences, Access.READ, "T", torch.int32),
        Buffer("page_tables", page_tables, Access.READ, "S pages", torch.int32),
        Buffer("k_scale", k_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("v_scale", v_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("q", q, Access.WRITE, "T H 128", torch.bfloat16),
        Buffer("k_pages", k_pages, Access.UPDATE, "P K 64 128", page_dtype),
        Buffer("v_pages", v_pages, Access.UPDATE, "P K 64 128", page_dtype),
        Buffer("num_tokens", num_tokens, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("rope_kv", device, buffers)
    num_heads, num_kv_heads = sizes["H"], sizes["K"]
    check_size("rope_kv", "H", num_heads, multiple_of=num_kv_heads, at_least=num_kv_heads)
    check_size(
        "rope_kv", "heads", sizes["heads"], at_least=num_heads + 2 * num_kv_heads, at_most=num_heads + 2 * num_kv_heads
    )
    num_threads = sizes["T"] * sizes["heads"] * _THREADS_PER_HEAD
    device.launch(
        Launch(
            program(num_heads, num_kv_heads, is_fp8=is_fp8, is_interleaved=is_interleaved),
            "rope_kv",
            grid=(-(-num_threads // _NUM_THREADS), 1, 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=(*buffers, int32("most_tokens", sizes["T"]), int32("max_pages", sizes["pages"])),
            overlaps_previous=True,
        )
    )


def program(num_heads: int, num_kv_heads: int, *, is_fp8: bool, is_interleaved: bool) -> Program:
    """The kernel for a model's heads, KV dtype and form of pairs."""
    return Program.of(
        "rope_kv",
        NUM_THREADS=_NUM_THREADS,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        FP8_KV=int(is_fp8),
        INTERLEAVED=int(is_interleaved),
    )


def angle_table(theta: float, num_positions: int) -> torch.Tensor:
    """[num_positions, 2, 64] FP32: cosines and sines of position * theta^(-2 i / 128), computed in FP64, rounded once."""
    frequencies = theta ** (-np.arange(0, HEAD_DIM, 2, dtype=np.float64) / HEAD_DIM)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * frequencies
    return torch.from_numpy(np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32))


def rope_kv_reference(
    *,
    qkv: torch.Tensor,
    angles: torch.Tensor,
    positions: torch.Tensor,
    sequences: torch.Tensor,
    page_tables: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    num_tokens: torch.Tensor,
    is_interleaved: bool,
) -> dict[str, torch.Tensor]:
    """The same in FP64, rounded to nothing: pages hold real value / scale, where they are written."""
    num_heads, num_kv_heads = q.shape[1], k_pages.shape[1]
    turned = _turned(qkv[:, : num_heads + num_kv_heads].double(), angles[positions.long()].double(), is_interleaved)
    k, v = turned[:, num_heads:], qkv[:, num_heads + num_kv_heads :].double()
    if k_scale is not None and v_scale is not None:
        k, v = k / k_scale.double(), v / v_scale.double()
    pages = page_tables[sequences.long(), positions.long() // PAGE_TOKENS].long()
    rows = positions.long() % PAGE_TOKENS
    places = stored_dimensions(k_pages.dtype)[rows]
    expected = {"q": turned[:, :num_heads]}
    for name, kept, values in (("k_pages", k_pages, k), ("v_pages", v_pages, v)):
        stored = torch.empty_like(values).scatter_(2, places.unsqueeze(1).expand(values.shape), values)
        expected[name] = kept.double()
        expected[name][pages, :, rows] = stored.clamp(-448, 448) if k_scale is not None else stored
    return expected


def _turned(heads: torch.Tensor, angles: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    cosines, sines = angles[:, None, 0], angles[:, None, 1]
    a, b = (heads[..., ::2], heads[..., 1::2]) if is_interleaved else heads.chunk(2, dim=-1)
    pairs = (a * cosines - b * sines, b * cosines + a * sines)
    return torch.stack(pairs, dim=-1).flatten(-2) if is_interleaved else torch.cat(pairs, dim=-1)


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """Half a unit of the output format, and three FP32 roundings of terms at most 1.5 times the largest of the head.

    The terms of a turned pair may cancel, so their roundings count against the head's largest |value|, not the result.
    """
    largest = inputs["qkv"].double().abs().max()
    rounding = 1.5 * 3 * 2.0**-24 * largest
    found = {"q": expected["q"].abs() * 2.0**-8 + rounding}
    for name, scale in (("k_pages", inputs["k_scale"]), ("v_pages", inputs["v_scale"])):
        if scale is None:
            found[name] = expected[name].abs() * 2.0**-8 + rounding
        else:
            found[name] = code_bounds(expected[name], 3 * 2.0**-24) + rounding / scale.double()
        is_written = expected[name] != inputs[name].double()
        found[name] = torch.where(is_written, found[name], 0.0)
    return found


_NEMO = {"H": 32, "K": 8, "max_pages": 16}
CASES = (
    Case("NeMo decode", _NEMO | {"T": 64}, {"fp8": True}, is_emulated=False, is_timed=True),
    Case("NeMo prefill", _NEMO | {"T": 8192, "max_pages": 2048}, {"fp8": True}, is_emulated=False, is_timed=True),
    Case("NeMo BF16", _NEMO | {"T": 17}, {"fp8": False}),
    Case("NeMo FP8", _NEMO | {"T": 17}, {"fp8": True}),
    Case("interleaved BF16", _NEMO | {"T": 9}, {"fp8": False, "interleaved": True}),
    Case("interleaved FP8", {"T": 6, "H": 8, "K": 8, "max_pages": 3}, {"fp8": True, "interleaved": True}),
    Case("one KV head", {"T": 70, "H": 5, "K": 1, "max_pages": 2}, {"fp8": False}),
    Case("eight to one", {"T": 1, "H": 16, "K": 2, "max_pages": 1}, {"fp8": True}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Consecutive tokens of sequences whose pages lie anywhere; so that K saturates somewhere, scales are small."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_heads, num_kv_heads = (case.sizes[letter] for letter in "THK")
    max_pages = case.sizes["max_pages"]
    num_positions = max_pages * PAGE_TOKENS
    tokens_per_sequence = min(num_positions, 37)
    num_sequences = -(-num_tokens // tokens_per_sequence)
    num_pages = num_sequences * max_pages + 1
    first = torch.randint(num_positions - tokens_per_sequence + 1, (num_sequences,), generator=generator)
    tokens = torch.arange(num_tokens)
    sequences = tokens // tokens_per_sequence
    is_fp8 = case.options["fp8"]
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    shape = (num_pages, num_kv_heads, PAGE_TOKENS, HEAD_DIM)
    order = torch.randperm(num_pages, generator=generator)[: num_sequences * max_pages]
    return {
        "qkv": torch.randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, generator=generator).bfloat16(),
        "angles": angle_table(1e6, num_positions),
        "positions": (first[sequences] + tokens % tokens_per_sequence).int(),
        "sequences": sequences.int(),
        "page_tables": order.view(num_sequences, max_pages).int(),
        "k_scale": torch.tensor([0.006]) if is_fp8 else None,
        "v_scale": torch.tensor([0.013]) if is_fp8 else None,
        "q": torch.empty(num_tokens, num_heads, HEAD_DIM, dtype=torch.bfloat16),
        "k_pages": torch.randn(shape, generator=generator).to(dtype),
        "v_pages": torch.randn(shape, generator=generator).to(dtype),
        "num_tokens": torch.tensor([num_tokens], dtype=torch.int32),
        "is_interleaved": case.options.get("interleaved", False),
    }


def cost(case: Case) -> Cost:
    """Everything is read once and written once; angles come from the L2."""
    num_tokens, num_heads, num_kv_heads = (case.sizes[letter] for letter in "THK")
    kv_bytes = 1 if case.options["fp8"] else 2
    per_token = HEAD_DIM * (2 * (2 * num_heads + 2 * num_kv_heads) + 2 * num_kv_heads * kv_bytes)
    return Cost(flops=num_tokens * (num_heads + num_kv_heads) * 3 * HEAD_DIM, bytes=num_tokens * per_token)


OP = Op(
    name="rope_kv",
    formula="q, k = turned(q, k, position); pages[page, :, row] = k, v",
    launch=rope_kv,
    make_inputs=make_inputs,
    reference=rope_kv_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=tuple(
        program(32, 8, is_fp8=is_fp8, is_interleaved=is_interleaved)
        for is_fp8 in (False, True)
        for is_interleaved in (False, True)
    ),
    outputs=("q",),
    updated=("k_pages", "v_pages"),
)
