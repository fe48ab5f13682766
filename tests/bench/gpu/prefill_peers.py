"""Other people's attention of chunks of prompts, for chunks that are alike: as many tokens behind as many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from kernels.kv_layout import HEAD_DIM, PAGE_TOKENS
from kernels.op import Inputs
from tests.bench.gpu.peers import FLASH_ATTENTION_3, FLASHINFER, MakePeer, Peer, bf16_pages


def prefill_attention_peers(inputs: Inputs) -> dict[str, MakePeer]:
    """For chunks of many query tokens. Those that know no FP8 for this get BF16 copies."""
    suffix = "" if inputs["k_scale"] is None else ", BF16 KV"
    return {
        f"SDPA{suffix}": _sdpa,
        f"FlexAttention{suffix}": _flex_attention,
        f"FlashAttention 3, paged{suffix}": _flash_attention_3,
        f"FlashInfer, paged{suffix}": _flashinfer,
    }


@dataclass(frozen=True)
class _Alike:
    """`num_chunks` chunks of `num_tokens` tokens behind `start` others, and the page tables [chunks, pages] of each."""

    num_chunks: int
    start: int
    num_tokens: int
    tables: torch.Tensor

    @property
    def length(self) -> int:
        """Keys of each sequence."""
        return self.start + self.num_tokens

    @classmethod
    def of(cls, inputs: Inputs) -> _Alike:
        """ValueError if they are not."""
        starts: dict[tuple[int, int, int], int] = {}
        for sequence, row_of_position_0, position, length in inputs["tiles"].tolist():
            chunk = (row_of_position_0, sequence, length)
            starts[chunk] = min(position, starts.get(chunk, position))
        kinds = {(start, length) for (_, _, length), start in starts.items()}
        if len(kinds) > 1:
            raise ValueError(f"the chunks are of {len(kinds)} kinds, expected one")
        ((start, length),) = kinds
        sequences = [sequence for _, sequence, _ in sorted(starts)]
        tables = inputs["page_tables"][sequences, : -(-length // PAGE_TOKENS)].contiguous()
        return cls(len(sequences), start, length - start, tables)

    def queries(self, inputs: Inputs) -> torch.Tensor:
        """[chunks, tokens, H, D]."""
        q: torch.Tensor = inputs["q"]
        return q.view(self.num_chunks, self.num_tokens, *q.shape[1:])

    def contiguous(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [chunks, H, tokens, D], and keys and values [chunks, K, length, D] as one piece for each sequence."""
        keys, values = (
            pages[self.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, : self.length].contiguous()
            for pages in bf16_pages(inputs)
        )
        return self.queries(inputs).transpose(1, 2).contiguous(), keys, values


def _heads_first(inputs: Inputs) -> Callable[[torch.Tensor], torch.Tensor]:
    """Results [chunks, H, tokens, D] to the form of our output [T, H D]."""
    return lambda result: result.transpose(1, 2).reshape(len(inputs["q"]), -1)


def _sdpa(inputs: Inputs) -> Peer:
    alike = _Alike.of(inputs)
    q, k, v = alike.contiguous(inputs)
    attend = torch.nn.functional.scaled_dot_product_attention
    if alike.start == 0:
        return Peer(lambda: attend(q, k, v, is_causal=True, enable_gqa=True), _heads_first(inputs))
    mask = import_module("torch.nn.attention.bias").causal_lower_right(alike.num_tokens, alike.length)
    return Peer(lambda: attend(q, k, v, attn_mask=mask, enable_gqa=True), _heads_first(inputs))


def _flex_attention(inputs: Inputs) -> Peer:
    flex = import_module("torch.nn.attention.flex_attention")
    alike = _Alike.of(inputs)
    q, k, v = alike.contiguous(inputs)
    if not q.is_cuda:
        raise RuntimeError("is compiled for GPUs alone")

    def is_seen(chunk: torch.Tensor, head: torch.Tensor, token: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= token + alike.start

    mask = flex.create_block_mask(is_seen, None, None, alike.num_tokens, alike.length, device=q.device)
    attend: Callable[..., torch.Tensor] = torch.compile(flex.flex_attention, dynamic=False)
    return Peer(lambda: attend(q, k, v, block_mask=mask, enable_gqa=True), _heads_first(inputs))


def _flash_attention_3(inputs: Inputs) -> Peer:
    attend = import_module(FLASH_ATTENTION_3).flash_attn_with_kvcache
    alike = _Alike.of(inputs)
    k, v = (pages.transpose(1, 2).contiguous() for pages in bf16_pages(inputs))
    arguments = {
        "q": alike.queries(inputs),
        "k_cache": k,
        "v_cache": v,
        "cache_seqlens": torch.full((alike.num_chunks,), alike.length, dtype=torch.int32, device=k.device),
        "page_table": alike.tables,
        "causal": True,
    }
    return Peer(lambda: attend(**arguments), lambda result: result.reshape(len(inputs["q"]), -1))


def _flashinfer(inputs: Inputs) -> Peer:
    flashinfer = import_module(FLASHINFER)
    alike = _Alike.of(inputs)
    q, pages = inputs["q"], bf16_pages(inputs)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    counts = torch.arange(alike.num_chunks + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        counts * alike.num_tokens,
        counts * alike.tables.shape[1],
        alike.tables.flatten(),
        torch.full((alike.num_chunks,), (alike.length - 1) % PAGE_TOKENS + 1, dtype=torch.int32, device=q.device),
        q.shape[1],
        pages[0].shape[1],
        HEAD_DIM,
        PAGE_TOKENS,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=pages[0].dtype,
    )
    return Peer(lambda: wrapper.run(q, pages), lambda result: result.reshape(len(q), -1))
