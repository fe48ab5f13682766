"""The paged KV memory: K and V of every layer, in pages of 64 tokens."""

from __future__ import annotations

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PAGE_TOKENS


def kv_shape(config: ModelConfig, num_pages: int) -> tuple[int, ...]:
    """[layer][page][kv_head][token in page][head_dim] of K, and of V."""
    return (config.num_layers, num_pages, config.num_kv_heads, PAGE_TOKENS, config.head_dim)


class KvPages:
    """K and V, each of `kv_shape` in the KV dtype.

    A (page, KV head) pair is one contiguous [64, D] piece, called a tile here, with index `page * K + kv_head`.
    """

    def __init__(self, config: ModelConfig, num_pages: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shape = kv_shape(config, num_pages)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def clear(self, pages: torch.Tensor) -> None:
        """Zero `pages` [n] int64 before their first token is written.

        Attention adds to scores of keys behind the end of a sequence, and multiplies their values by exactly 0; were
        what an earlier sequence left there NaN, it would reach this one.
        """
        self._keys.index_fill_(1, pages, 0.0)
        self._values.index_fill_(1, pages, 0.0)

    def write(self, layer: int, pages: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, K, D] of tokens that lie in `pages` [T] at `offsets` [T], both int64."""
        self._keys[layer][pages, :, offsets] = k.to(self._keys.dtype)
        self._values[layer][pages, :, offsets] = v.to(self._values.dtype)

    def tiles(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of K and V of a layer as [num_pages * K, 64, D]."""
        return self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1)

    def page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of K and V of a page as [L, K, 64, D]."""
        return self._keys[:, page], self._values[:, page]
