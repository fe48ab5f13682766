"""Contexts in which a few keys stand out, each for one query: whether attention finds them says that it reads the right places.

A reference that walks the page table as the kernel does may make the same mistake. That the result is the value which was
planted at a position depends on no walk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.decode_attention import OP as DECODE
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled
from kernels.launch import Device
from kernels.op import Inputs, Op
from kernels.prefill_attention import OP as PREFILL
from kernels.prefill_attention import Chunk, plan_tiles

_PLANTED_WEIGHT = 0.9
_FOUND, _NOT_FOUND = 0.8, 0.2


def far_positions(length: int) -> tuple[int, ...]:
    """The ends, the middle, and both sides of an edge of pages early and late; each at most once."""
    late_edge = (length - 2) // PAGE_TOKENS * PAGE_TOKENS
    places = (0, PAGE_TOKENS - 1, PAGE_TOKENS, length // 2, late_edge - 1, late_edge, length - 2, length - 1)
    return tuple(dict.fromkeys(places))


@dataclass(frozen=True)
class Probes:
    """One sequence on scattered pages; `queries` [n, H, 128] BF16 and `values` [n, K, 128] FP32 belong to `positions` [n].

    Query i and the key at position i of `positions` are so alike that the key gets nine tenths of the weight of all `length`;
    every other key gets what chance gives it.
    """

    positions: tuple[int, ...]
    length: int
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    queries: torch.Tensor
    values: torch.Tensor

    @classmethod
    def make(
        cls, length: int, num_heads: int, num_kv_heads: int, *, is_fp8: bool, num_pages: int = 0, seed: int = 0
    ) -> Probes:
        """`num_pages` 0: one more than are needed."""
        generator = torch.Generator().manual_seed(seed)
        positions = far_positions(length)
        own_pages = -(-length // PAGE_TOKENS)
        directions = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=generator)).Q[: len(positions)]
        k, v = (torch.randn(own_pages * PAGE_TOKENS, num_kv_heads, HEAD_DIM, generator=generator) for _ in range(2))
        # Of a query of norm sqrt(128), scores of normal keys have mean 0 and variance 1, their weights the mean exp(1/2).
        others = math.log(length) + 0.5
        score = others + math.log(_PLANTED_WEIGHT / (1 - _PLANTED_WEIGHT))
        k[list(positions)] = score * directions[:, None]
        queries = (math.sqrt(HEAD_DIM) * directions[:, None]).expand(-1, num_heads, -1).bfloat16()
        order = torch.randperm(num_pages or own_pages + 1, generator=generator)[:own_pages]
        pages = [_in_pages(kept, order, num_pages or own_pages + 1, is_fp8=is_fp8) for kept in (k, v)]
        return cls(
            positions, length, pages[0], pages[1], order.int()[None], queries.contiguous(), v[list(positions)].clone()
        )

    def decode_inputs(self, rows: Sequence[tuple[int, int]]) -> Inputs:
        """Of decode_attention: rows of (probe, length)."""
        return self._pages() | {
            "q": self.queries[[probe for probe, _ in rows]].contiguous(),
            "sequences": torch.zeros(len(rows), dtype=torch.int32),
            "lengths": torch.tensor([length for _, length in rows], dtype=torch.int32),
            "out": self._outputs(len(rows)),
            "num_rows": torch.tensor([len(rows)], dtype=torch.int32),
        }

    def prefill_inputs(self, start: int, num_tokens: int) -> Inputs:
        """Of prefill_attention: a chunk from `start` on, whose tokens take the queries in turns."""
        num_heads, num_kv_heads = self.queries.shape[1], self.k_pages.shape[1]
        tiles = plan_tiles([Chunk(0, start, num_tokens)], num_heads, num_kv_heads)
        return self._pages() | {
            "q": self.queries[[i % len(self.positions) for i in range(num_tokens)]].contiguous(),
            "tiles": tiles,
            "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32),
            "unscaled": None,
            "out": self._outputs(num_tokens),
        }

    def moved(self, num_pages: int, page_ids: torch.Tensor, device: torch.device) -> Probes:
        """The same on `page_ids` of pools of `num_pages`, in which nothing else is written."""
        own = self.page_table[0].long()
        pools = []
        for pages in (self.k_pages, self.v_pages):
            pool = torch.empty(num_pages, *pages.shape[1:], dtype=pages.dtype, device=device)
            for to, source in zip(page_ids.tolist(), own.tolist(), strict=True):
                pool[to].view(torch.uint8).copy_(pages[source].view(torch.uint8))
            pools.append(pool)
        return replace(self, k_pages=pools[0], v_pages=pools[1], page_table=page_ids.int()[None])

    def planted_weights(self, out: torch.Tensor, probes: Sequence[int]) -> torch.Tensor:
        """[rows, H]: how much of the value of its probe there is in each row of `out` [rows, H 128]."""
        num_heads, num_kv_heads = self.queries.shape[1], self.values.shape[1]
        values = self.values[list(probes)].repeat_interleave(num_heads // num_kv_heads, dim=1)
        return (out.float().view_as(values) * values).sum(dim=2) / values.square().sum(dim=2)

    def _pages(self) -> Inputs:
        is_fp8 = self.k_pages.dtype == torch.float8_e4m3fn
        one = torch.ones(1) if is_fp8 else None
        return {
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "page_tables": self.page_table,
            "k_scale": one,
            "v_scale": one,
            "scale": None,
            "static_scale": None,
        }

    def _outputs(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self.queries.shape[1] * HEAD_DIM, dtype=torch.bfloat16)


def check_decode(device: Device, probes: Probes, rows: Sequence[tuple[int, int]]) -> None:
    """Rows of (probe, length) find what their length lets them see, and nothing else; and are what FP64 gives."""
    inputs = probes.decode_inputs(rows)
    out = launched(DECODE, inputs, device)
    weights = probes.planted_weights(out, [probe for probe, _ in rows])
    for (probe, length), found in zip(rows, weights, strict=True):
        _check_found(found, is_visible=probes.positions[probe] < length, what=f"{probes.positions[probe]} of {length}")
    _check_error(DECODE, inputs, out)


def check_prefill(device: Device, probes: Probes, start: int, num_tokens: int) -> None:
    """The same for the tokens of a chunk."""
    inputs = probes.prefill_inputs(start, num_tokens)
    out = launched(PREFILL, inputs, device)
    of_rows = [i % len(probes.positions) for i in range(num_tokens)]
    weights = probes.planted_weights(out, of_rows)
    for row, (probe, found) in enumerate(zip(of_rows, weights, strict=True)):
        position = probes.positions[probe]
        _check_found(found, is_visible=position <= start + row, what=f"{position} from {start + row}")
    _check_error(PREFILL, inputs, out)


def launched(op: Op, inputs: Inputs, device: Device) -> torch.Tensor:
    """`out` of a launch with all tensors on the device, on the CPU."""
    place = device.torch_device
    there = {name: value.to(place) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    op.launch(device, **there)
    device.synchronize()
    out: torch.Tensor = there["out"].cpu()
    return out


def _check_found(found: torch.Tensor, *, is_visible: bool, what: str) -> None:
    right = found > _FOUND if is_visible else found < _NOT_FOUND
    assert right.all(), f"the key at {what} has weights {found.tolist()}, expected {'most' if is_visible else 'none'}"


def _check_error(op: Op, inputs: Inputs, out: torch.Tensor) -> None:
    expected = op.reference(**inputs)
    bound = torch.as_tensor(op.bounds(inputs, expected)["out"])
    error = (out.double() - expected["out"]).abs()
    assert (error <= bound).all(), f"error / bound is {(error / bound).max().item():.2f}"


def _in_pages(kept: torch.Tensor, order: torch.Tensor, num_pages: int, *, is_fp8: bool) -> torch.Tensor:
    """[num_pages, K, 64, 128], with `kept` [tokens, K, 128] on the pages `order`; the others hold NaN."""
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    pages = torch.full((num_pages, kept.shape[1], PAGE_TOKENS, HEAD_DIM), torch.nan).to(dtype)
    tokens = kept.to(dtype).view(-1, PAGE_TOKENS, *kept.shape[1:]).transpose(1, 2).contiguous()
    pages.view(torch.uint8)[order] = swizzled(tokens).view(torch.uint8)
    return pages
