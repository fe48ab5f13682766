"""Pages in host memory that KV pages of the device are copied to, when it has too few, and back from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from backend.checkpoint.model_config import ModelConfig
from backend.engine.plan import PageCopy
from backend.runner.kv_pages import KvPages, kv_shape
from backend.runner.pinning import CudaPinner, Pinner, Pinning, pinnable


class HostPages:
    """K and V in the layout of KvPages, on the CPU; pinned for a CUDA device, so that copies run beside the host.

    Nothing is written before a page is first used: without a GPU the operating system commits the memory then, so that
    pages never used cost nothing. For a GPU all of it is committed while it is pinned, beside what the engine does meanwhile.
    """

    def __init__(self, config: ModelConfig, num_pages: int, kv: KvPages, pinner: Pinner | None = None) -> None:
        """`pinner` default: CUDA's if `kv` lies on a GPU, else none."""
        self._kv = kv
        keys, _ = kv.page(0)
        shape = kv_shape(config, num_pages)
        memory = [pinnable(math.prod(shape) * keys.dtype.itemsize) for _ in range(2)]
        self._keys, self._values = (part.view(keys.dtype).view(shape) for part in memory)
        if pinner is None and keys.device.type == "cuda":
            pinner = CudaPinner(keys.device)
        copy_bytes = math.prod(shape[2:]) * keys.dtype.itemsize
        self._pinning = None if pinner is None else Pinning(memory, copy_bytes, pinner)

    def close(self) -> None:
        """Unpin the memory; no copy may be under way."""
        if self._pinning is not None:
            self._pinning.close()

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
