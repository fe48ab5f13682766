"""The peer transformers: its continuous batching, asked in its own process without any network.

It has no FP8 without packages of its own kernels, so weights and KV are BF16.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.peers.continuous_batching import NO_END, PAGE_TOKENS, start_manager
from tests.bench.serving.checkpoint import write_config
from tests.bench.serving.scale import Scale
from tests.bench.serving.way import Progress, ServingError

_IDLE_S = 0.5
_STOP_TIMEOUT_S = 10.0


class TransformersWay:
    """Requests to its manager, whose thread runs the model."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._num_seen: dict[int, int] = {}

    def submit(self, handle: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Begin one."""
        self._num_seen[handle] = 0
        self._manager.add_request(list(prompt), str(handle), max_tokens, streaming=True, eos_token_id=NO_END)

    def take_back(self, handle: int) -> None:
        """Cancel it."""
        self._manager.cancel_request(str(handle))

    def progress(self, timeout_s: float) -> Sequence[Progress]:
        """Results of its output queue; each has all ids so far."""
        news: list[Progress] = []
        result = self._manager.get_result(timeout=max(timeout_s, 1e-3))
        while result is not None:
            if result.error is not None:
                raise ServingError(str(result.error))
            handle, num_tokens = int(result.request_id), len(result.generated_tokens)
            num_new, self._num_seen[handle] = num_tokens - self._num_seen.get(handle, 0), num_tokens
            news.append(Progress(handle, num_new, time.perf_counter(), result.is_finished()))
            result = self._next()
        return news

    def wait_until_idle(self) -> None:
        """It does not say when it is; what is cancelled ends within a step or two."""
        time.sleep(_IDLE_S)

    def close(self) -> None:
        """End its thread."""
        self._manager.stop(block=True, timeout=_STOP_TIMEOUT_S)

    def _next(self) -> Any:
        try:
            return self._manager.output_router.output_queue.get_nowait()
        except queue.Empty:
            return None


def transformers_way(checkpoint: Path, scale: Scale, device: torch.device) -> TransformersWay:
    """Random weights of the same shape, KV for what the scenarios need."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = checkpoint.with_name("transformers")
    write_config(folder, scale.config, is_fp8=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    tokens = max(s.num_concurrent * (s.prompt_tokens + s.output_tokens + PAGE_TOKENS) for s in scale.scenarios)
    manager = start_manager(
        model,
        max_tokens=max(scenario.output_tokens for scenario in scale.scenarios),
        num_blocks=tokens // PAGE_TOKENS + 16,
        max_batch_tokens=int(scale.settings["max_step_tokens"]),
        is_sampled=True,
    )
    return TransformersWay(manager)
