"""How the error of attention grows with the context: FP8 KV beside BF16 KV, against FP64 on the values before rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.decode_attention import OP as DECODE
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, swizzled
from kernels.launch import Device
from kernels.op import Inputs, Op
from kernels.prefill_attention import OP as PREFILL
from kernels.prefill_attention import Chunk, plan_tiles
from tests.kernels.far_probes import launched

LENGTHS = (1024, 4096, 16384, 65536, 131072)
KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_NUM_SINKS = 4
_NUM_LOUD_CHANNELS = 4
_LOUD = 6.0
_SHARE_OF_RELATED = 1 / 64


@dataclass(frozen=True)
class Context:
    """Queries [n, H, 128] of the last tokens of a sequence, and its keys and values [length, K, 128]; all FP32."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def diffuse(length: int, num_queries: int, num_heads: int, num_kv_heads: int, generator: torch.Generator) -> Context:
    """Normal values everywhere: scores of variance 1, so that every key has about the same weight."""
    queries, keys, values = (
        torch.randn(shape, generator=generator)
        for shape in (
            (num_queries, num_heads, HEAD_DIM),
            (length, num_kv_heads, HEAD_DIM),
            (length, num_kv_heads, HEAD_DIM),
        )
    )
    return Context(queries, keys, values)


def like_a_model(
    length: int, num_queries: int, num_heads: int, num_kv_heads: int, generator: torch.Generator
) -> Context:
    """What caches of language models are reported to look like, made up.

    A few channels of keys are many times louder than the others, in every token (KIVI, arXiv:2402.02750). The first tokens draw
    about a third of the weight and have small values (attention sinks, arXiv:2309.17453). Keys and values have heavy tails
    (Student's t, 5 degrees of freedom). One key in 64 is related to what is asked, so that scores spread over several units.
    """

    def heavy_tailed(*shape: int) -> torch.Tensor:
        # By hand, because torch's distributions take no generator. The variance, 5/3, is divided away.
        normal = torch.randn(shape, generator=generator)
        squares = torch.randn(*shape, 5, generator=generator).square().mean(dim=-1)
        return normal * squares.rsqrt() / math.sqrt(5 / 3)

    topic = torch.nn.functional.normalize(torch.randn(num_kv_heads, HEAD_DIM, generator=generator), dim=1)
    loud = torch.zeros(num_kv_heads, HEAD_DIM)
    for head in range(num_kv_heads):
        loud[head, torch.randperm(HEAD_DIM, generator=generator)[:_NUM_LOUD_CHANNELS]] = _LOUD
    # All queries have much of one direction, of which no key but the sinks' has any.
    common = torch.nn.functional.normalize(torch.randn(num_kv_heads, HEAD_DIM, generator=generator), dim=1)
    group = num_heads // num_kv_heads
    queries = torch.randn(num_queries, num_heads, HEAD_DIM, generator=generator)
    queries += (4 * topic + 20 * common).repeat_interleave(group, dim=0)
    keys = heavy_tailed(length, num_kv_heads, HEAD_DIM) + loud
    is_related = torch.rand(length, generator=generator) < _SHARE_OF_RELATED
    keys[is_related] += 8 * topic
    keys -= (keys * common).sum(dim=2, keepdim=True) * common
    values = heavy_tailed(length, num_kv_heads, HEAD_DIM)
    values[:_NUM_SINKS] *= 0.05
    _draw_a_third(queries, keys, common, group)
    return Context(queries, keys, values)


def _draw_a_third(queries: torch.Tensor, keys: torch.Tensor, common: torch.Tensor, group: int) -> None:
    """Put the sinks' keys along `common` [K, 128], so far that the queries give them about a third of the weight."""
    for head in range(keys.shape[1]):
        asked = queries[:, head * group : (head + 1) * group].flatten(0, 1) / math.sqrt(HEAD_DIM)
        others = float((asked @ keys[_NUM_SINKS:, head].T).logsumexp(dim=1).mean())
        score = others - math.log(2 * _NUM_SINKS)
        keys[:_NUM_SINKS, head] = common[head] * (score / float((asked @ common[head]).mean()))


CONTEXTS: dict[str, Callable[[int, int, int, int, torch.Generator], Context]] = {
    "diffuse": diffuse,
    "like a model's": like_a_model,
}


def measure(
    device: Device, lengths: Sequence[int], *, num_queries: int, num_heads: int, num_kv_heads: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A cell for each context, length, kernel and KV dtype: `error`, the norm of the difference over the norm of the result."""
    for name, make in CONTEXTS.items():
        for length in lengths:
            generator = torch.Generator().manual_seed(seed)
            context = make(length, num_queries, num_heads, num_kv_heads, generator)
            expected = attended(context)
            for op in (DECODE, PREFILL):
                for dtype_name, dtype in KV_DTYPES.items():
                    error = run(op, context, dtype, device).double() - expected
                    yield {
                        "context": name,
                        "length": length,
                        "kernel": op.name,
                        "kv_dtype": dtype_name,
                        "error": float(error.square().sum().sqrt() / expected.square().sum().sqrt()),
                    }


def line(cell: dict[str, Any]) -> str:
    """For people."""
    return (
        f"error of {cell['kernel']:<17} over {cell['length']:>6} tokens {cell['context']:<14} KV {cell['kv_dtype']:<4}  "
        f"{cell['error']:.3%}"
    )


def attended(context: Context) -> torch.Tensor:
    """[n, H 128] in FP64: queries as the kernels get them, in BF16, keys and values as they were."""
    num_queries, num_heads, _ = context.queries.shape
    length, num_kv_heads, _ = context.keys.shape
    queries = context.queries.bfloat16().double().unflatten(1, (num_kv_heads, -1)) / math.sqrt(HEAD_DIM)
    is_seen = torch.arange(length) <= torch.arange(length - num_queries, length)[:, None]
    scores = torch.einsum("tkgd,lkd->kgtl", queries, context.keys.double()).where(is_seen, -math.inf)
    out = torch.einsum("kgtl,lkd->tkgd", scores.softmax(dim=-1), context.values.double())
    return out.reshape(num_queries, num_heads * HEAD_DIM)


def run(op: Op, context: Context, dtype: torch.dtype, device: Device) -> torch.Tensor:
    """[n, H 128] FP32 on the CPU: one of the kernels on pages of `dtype`, of scale 1, that lie anywhere."""
    num_queries, num_heads, _ = context.queries.shape
    length, num_kv_heads, _ = context.keys.shape
    num_pages = -(-length // PAGE_TOKENS)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(length))
    one = torch.ones(1) if dtype.itemsize == 1 else None
    inputs: Inputs = {
        "q": context.queries.bfloat16(),
        "k_pages": _pages(context.keys, order, dtype),
        "v_pages": _pages(context.values, order, dtype),
        "k_scale": one,
        "v_scale": one,
        "page_tables": order[None].int(),
        "out": torch.empty(num_queries, num_heads * HEAD_DIM, dtype=torch.bfloat16),
        "scale": None,
        "static_scale": None,
    }
    if op is DECODE:
        inputs |= {
            "sequences": torch.zeros(num_queries, dtype=torch.int32),
            "lengths": torch.arange(length - num_queries + 1, length + 1, dtype=torch.int32),
            "num_rows": torch.tensor([num_queries], dtype=torch.int32),
        }
    else:
        tiles = plan_tiles([Chunk(0, length - num_queries, num_queries)], num_heads, num_kv_heads)
        inputs |= {"tiles": tiles, "num_tiles": torch.tensor([len(tiles)], dtype=torch.int32), "unscaled": None}
    return launched(op, inputs, device).float()


def _pages(kept: torch.Tensor, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[P, K, 64, 128] in `dtype`, the pages of `kept` [length, K, 128] at the places `order`, its end filled up with zeros."""
    num_pages = len(order)
    filled = torch.zeros(num_pages * PAGE_TOKENS, *kept.shape[1:], dtype=dtype)
    filled[: len(kept)] = kept.to(dtype)
    tokens = filled.view(num_pages, PAGE_TOKENS, *kept.shape[1:]).transpose(1, 2).contiguous()
    pages = torch.empty_like(tokens)
    pages.view(torch.uint8)[order] = swizzled(tokens).view(torch.uint8)
    return pages
