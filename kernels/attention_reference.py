"""What the attention kernels are checked against: softmax attention over pages in FP64, and how far their roundings move it."""

from __future__ import annotations

import math

import torch

from kernels.e4m3 import code_bounds, row_scales
from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS, unswizzled
from kernels.op import Inputs


def kept_values(pages: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Keys or values [P, K, 64, 128] in FP64, as they are meant."""
    return unswizzled(pages).double() * (1.0 if factor is None else factor.item())


def attended(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_ids: torch.Tensor,
    start: int,
    weight_error: float,
    smallest_error: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [n, H, 128] in FP64 of query tokens [n, H, 128] from position `start` on, and how far roundings may move each.

    keys, values: `kept_values`; page_ids: the sequence's, in order. A score is a sum of 128 products in FP32: it may lose
    128 * 2^-24 of the sum of |q k|, and its exponent as much again (scaling, subtraction, exp2 within 2 ulp). A weight loses
    `weight_error` of itself by its rounding, but at least `smallest_error` of the largest weight, which is 1. The sums over the
    row lose 2^-24 per token at most, once above, once below.
    """
    num_tokens, num_kv_heads = len(q), keys.shape[1]
    end = start + num_tokens
    pages = page_ids[: -(-end // PAGE_TOKENS)].long()
    k, v = (kept[pages].transpose(1, 2).reshape(-1, num_kv_heads, HEAD_DIM)[:end] for kept in (keys, values))
    query = q.double().unflatten(1, (num_kv_heads, -1)) / math.sqrt(HEAD_DIM)
    is_seen = torch.arange(end) <= torch.arange(start, end)[:, None]
    weights = torch.einsum("tkgd,lkd->kgtl", query, k).where(is_seen, -math.inf).softmax(dim=-1)
    magnitude = torch.einsum("tkgd,lkd->kgtl", query.abs(), k.abs()).where(is_seen, 0.0).amax(dim=-1, keepdim=True)
    lost = 2 * magnitude * HEAD_DIM * 2.0**-23 + weight_error + 2 * end * 2.0**-24
    out = torch.einsum("kgtl,lkd->tkgd", weights, v).flatten(1, 2)
    spread = weights * torch.expm1(lost) + is_seen * smallest_error
    moved = torch.einsum("kgtl,lkd->tkgd", spread, v.abs()).flatten(1, 2) + out.abs() * (2 * end * 2.0**-24)
    return out, moved


def expected_outputs(
    y: torch.Tensor, scale: torch.Tensor | None, static_scale: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """`out`, and `scale` where it is written, for results y [T, H 128]; e4m3 unrounded."""
    if scale is not None:
        scales = row_scales(y)
        return {"scale": scales, "out": y / scales[:, None]}
    return {"out": y if static_scale is None else (y / static_scale.double()).clamp(-448, 448)}


def output_bounds(
    inputs: Inputs, expected: dict[str, torch.Tensor], moved: torch.Tensor
) -> dict[str, torch.Tensor | float]:
    """Bounds of `expected_outputs` for results that may have moved so far: half a unit of the format where the value then is."""
    if inputs["scale"] is not None:
        of_scale = moved.amax(dim=1) / 448.0 + expected["scale"] * 2.0**-22
        relative = (of_scale / expected["scale"])[:, None]
        of_codes = moved / expected["scale"][:, None] + expected["out"].abs() * relative
        return {"scale": of_scale, "out": _moved_code_bounds(expected["out"], of_codes)}
    if inputs["static_scale"] is not None:
        return {"out": _moved_code_bounds(expected["out"], moved / inputs["static_scale"].double())}
    return {"out": moved + (expected["out"].abs() + moved) * 2.0**-8}


def _moved_code_bounds(codes: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return code_bounds(codes.abs() + moved, 2.0**-22) + moved
