"""The paged KV memory: K and V of every layer, in pages of 64 tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.checkpoint import fp8
from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PAGE_TOKENS


def kv_shape(config: ModelConfig, num_pages: int) -> tuple[int, ...]:
    """[layer][page][kv_head][token in page][head_dim] of K, and of V."""
    return (config.num_layers, num_pages, config.num_kv_heads, PAGE_TOKENS, config.head_dim)


class KvPages:
    """K and V, each of `kv_shape` in the KV dtype.

    A (page, KV head) pair is one contiguous [64, D] piece, called a tile here, with index `page * K + kv_head`. FP8 pages
    hold e4m3 values: real value = value * scale of K or V of the layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scales: Sequence[tuple[float, float]] = (),
    ) -> None:
        """Zeroed pages. `scales`: of K and of V for each layer, used by FP8 pages alone; none given: 1."""
        is_scaled = dtype == fp8.DTYPE and scales
        self._scales = tuple(scales) if is_scaled else ((1.0, 1.0),) * config.num_layers
        assert len(self._scales) == config.num_layers
        shape = kv_shape(config, num_pages)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def clear(self, pages: torch.Tensor) -> None:
        """Zero `pages` [n] int64 before their first token is written.

        Attention adds to scores of keys behind the end of a sequence, and multiplies their values by exactly 0; were
        what an earlier sequence left there NaN, it would reach this one.
        """
        for kept in (self._keys, self._values):
            kept.view(torch.uint8).index_fill_(1, pages, 0)  # bytes, because PyTorch fills no FP8

    def write(self, layer: int, pages: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, K, D] of tokens that lie in `pages` [T] at `offsets` [T], both int64."""
        for kept, new, scale in zip((self._keys, self._values), (k, v), self._scales[layer], strict=True):
            stored = fp8.quantise(new, scale) if kept.dtype == fp8.DTYPE else new.to(kept.dtype)
            kept[layer][pages, :, offsets] = stored

    def scales(self, layer: int) -> tuple[float, float]:
        """What K and V of the tiles are to be multiplied by."""
        return self._scales[layer]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of K and V of a layer as [num_pages, K, 64, D]."""
        return self._keys[layer], self._values[layer]

    def tiles(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of K and V of a layer as [num_pages * K, 64, D]."""
        return self._keys[layer].flatten(0, 1), self._values[layer].flatten(0, 1)

    def page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of K and V of a page as [L, K, 64, D]."""
        return self._keys[:, page], self._values[:, page]
