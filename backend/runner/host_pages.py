"""Pages in host memory that KV pages of the device are copied to, when it has too few, and back from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PageCopy
from backend.runner.kv_pages import KvPages, kv_shape


class HostPages:
    """K and V in the layout of KvPages, on the CPU; pinned for a CUDA device, so that copies run beside the host.

    Nothing is written before a page is first used: without a GPU the operating system commits the memory then, so that
    pages never used cost nothing. Pinned memory is committed at once.
    """

    def __init__(self, config: ModelConfig, num_pages: int, kv: KvPages) -> None:
        self._kv = kv
        keys, _ = kv.page(0)
        is_pinned = keys.device.type == "cuda"
        shape = kv_shape(config, num_pages)
        self._keys = torch.empty(shape, dtype=keys.dtype, device="cpu", pin_memory=is_pinned)
        self._values = torch.empty(shape, dtype=keys.dtype, device="cpu", pin_memory=is_pinned)

    def run(self, copies: Iterable[PageCopy]) -> None:
        """Make `copies` in order; on a GPU in the order of its stream, before whatever is launched next."""
        for copy in copies:
            if copy.is_to_host:
                sources, targets = self._kv.page(copy.source), self._page(copy.target)
            else:
                sources, targets = self._page(copy.source), self._kv.page(copy.target)
            for source, target in zip(sources, targets, strict=True):
                # Layer by layer, because only the piece of one layer is contiguous: one plain copy of memory.
                for layer in range(len(source)):
                    target[layer].copy_(source[layer], non_blocking=True)

    def _page(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._keys[:, page], self._values[:, page]
