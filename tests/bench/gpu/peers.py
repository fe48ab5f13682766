"""Other people's kernels for the same work, those that are importable here: each beside ours on the same inputs.

A peer that gives something else than our kernel is not timed; why it is missing is in the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from kernels.kv_layout import PAGE_TOKENS, unswizzled
from kernels.op import Inputs

# Peers round outputs to BF16 and weights of attention too, our own outputs may be e4m3 (0.026), FP8 sums are as they are.
_MOST_RELATIVE_ERROR = 0.05

# Taken where they are installed; nothing here needs them, so they are pinned nowhere.
_VLLM, FLASH_ATTENTION_3, FLASHINFER = "vllm._custom_ops", "flash_attn_interface", "flashinfer"


@dataclass(frozen=True)
class Peer:
    """`run` does the work once and gives its result, in the shape of our output, after `finish`, which is not timed."""

    run: Callable[[], torch.Tensor]
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda result: result


MakePeer = Callable[[Inputs], Peer]


def usable_peers(
    makers: Mapping[str, MakePeer], inputs: Inputs, expected: torch.Tensor
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that run here and give `expected`, our own output; and why the others do not, by name."""
    usable, missing = {}, {}
    for name, make in makers.items():
        try:
            peer = make(inputs)
            error = relative_error(peer.finish(peer.run()), expected)
        except Exception as problem:  # Whatever a peer does, our own measurement goes on, and this is in the results.
            missing[name] = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}"
            continue
        if error <= _MOST_RELATIVE_ERROR:
            usable[name] = peer
        else:
            missing[name] = f"gives something else: relative error {error:.3f}"
    return usable, missing


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    difference = actual.float().reshape(-1) - expected.float().reshape(-1)
    return float(difference.square().mean().sqrt() / expected.float().square().mean().sqrt())


def linear_peers(inputs: Inputs) -> dict[str, MakePeer]:
    """For y = x W^T: cuBLASLt through torch, vLLM's CUTLASS kernel."""
    if inputs["x_scale"] is None:
        return {"torch (cuBLAS) BF16": lambda i: Peer(lambda: torch.nn.functional.linear(i["x"], i["weight"]))}
    return {
        "cuBLASLt rowwise": _scaled_mm_rowwise,
        "cuBLASLt tensorwise": _scaled_mm_tensorwise,
        "vLLM CUTLASS": _vllm_scaled_mm,
    }


def _scaled_mm_rowwise(inputs: Inputs) -> Peer:
    x, transposed = inputs["x"], inputs["weight"].t()
    scales = {"scale_a": inputs["x_scale"][:, None], "scale_b": inputs["weight_scale"][None, :]}
    return Peer(lambda: torch._scaled_mm(x, transposed, **scales, out_dtype=torch.bfloat16, use_fast_accum=True))


def _scaled_mm_tensorwise(inputs: Inputs) -> Peer:
    x, transposed = inputs["x"], inputs["weight"].t()
    # One scale for all: what makes the product small enough for BF16; the rows' own are put to its result, untimed.
    scale = torch.ones((), device=x.device)
    factors = inputs["x_scale"][:, None] * inputs["weight_scale"]
    return Peer(
        lambda: torch._scaled_mm(
            x, transposed, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        lambda result: result.float() * factors,
    )


def _vllm_scaled_mm(inputs: Inputs) -> Peer:
    ops = import_module(_VLLM)
    x, transposed = inputs["x"], inputs["weight"].t()
    scales = {"scale_a": inputs["x_scale"][:, None], "scale_b": inputs["weight_scale"][:, None]}
    return Peer(lambda: ops.cutlass_scaled_mm(x, transposed, **scales, out_dtype=torch.bfloat16))


def decode_attention_peers(inputs: Inputs) -> dict[str, MakePeer]:
    """For one query token a sequence, all of one length. SDPA and FlexAttention know no FP8: they get BF16 copies."""
    suffix = "" if inputs["k_scale"] is None else ", BF16 KV"
    return {
        f"SDPA{suffix}": _sdpa,
        f"FlexAttention{suffix}": _flex_attention,
        f"FlashAttention 3, paged{suffix}": _flash_attention_3,
        "FlashInfer, paged": _flashinfer,
    }


def _sdpa(inputs: Inputs) -> Peer:
    q, k, v = _contiguous(inputs)
    return Peer(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        _finish_attention(inputs),
    )


def _flex_attention(inputs: Inputs) -> Peer:
    flex = import_module("torch.nn.attention.flex_attention").flex_attention
    q, k, v = _contiguous(inputs)
    if not q.is_cuda:
        raise RuntimeError("is compiled for GPUs alone")
    attend: Callable[..., torch.Tensor] = torch.compile(flex, dynamic=False)
    return Peer(lambda: attend(q, k, v, enable_gqa=True), _finish_attention(inputs))


def _flash_attention_3(inputs: Inputs) -> Peer:
    attend = import_module(FLASH_ATTENTION_3).flash_attn_with_kvcache
    k, v = (pages.transpose(1, 2).contiguous() for pages in bf16_pages(inputs))
    arguments = {
        "q": inputs["q"][:, None],
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": inputs["lengths"],
        "page_table": _tables_by_row(inputs),
    }
    return Peer(lambda: attend(**arguments), _finish_attention(inputs))


def _flashinfer(inputs: Inputs) -> Peer:
    flashinfer = import_module(FLASHINFER)
    q, (num_rows, num_heads, head_dim) = inputs["q"], inputs["q"].shape
    pages = tuple(unswizzled(inputs[name]).contiguous() for name in ("k_pages", "v_pages"))
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    tables = _tables_by_row(inputs)
    num_pages = tables.shape[1]
    wrapper.plan(
        torch.arange(num_rows + 1, dtype=torch.int32, device=q.device) * num_pages,
        tables.flatten(),
        (inputs["lengths"] - 1) % PAGE_TOKENS + 1,
        num_heads,
        pages[0].shape[1],
        head_dim,
        PAGE_TOKENS,
        q_data_type=q.dtype,
        kv_data_type=pages[0].dtype,
    )
    scales: dict[str, Any] = {}
    if inputs["k_scale"] is not None:
        scales = {"k_scale": inputs["k_scale"].item(), "v_scale": inputs["v_scale"].item()}
    return Peer(lambda: wrapper.run(q, pages, **scales), _finish_attention(inputs))


def bf16_pages(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [P, K, 64, D] as real values, in tokens' order."""
    factors = (inputs["k_scale"], inputs["v_scale"])
    keys, values = (
        (unswizzled(inputs[name]).float() * (1.0 if factor is None else factor)).bfloat16()
        for name, factor in zip(("k_pages", "v_pages"), factors, strict=True)
    )
    return keys, values


def _tables_by_row(inputs: Inputs) -> torch.Tensor:
    """Page tables [T, pages] in the order of the queries."""
    tables: torch.Tensor = inputs["page_tables"][inputs["sequences"].long()]
    return tables.contiguous()


def _contiguous(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, H, 1, D], and keys and values [T, K, length, D] as one piece for each sequence."""
    length = int(inputs["lengths"][0])
    tables = _tables_by_row(inputs).long()
    keys, values = (
        pages[tables].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for pages in bf16_pages(inputs)
    )
    return inputs["q"][:, :, None], keys, values


def _finish_attention(inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    """To the form of our output, which may be e4m3 with a scale: real values [T, H D]."""
    return lambda result: result.reshape(len(inputs["q"]), -1)
