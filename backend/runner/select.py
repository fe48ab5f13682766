"""Chooses the ModelRunner for this machine, plans its memory, and loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.weights import weight_bytes
from backend.engine.plan import PAGE_TOKENS
from backend.runner.fake_runner import FakeRunner
from backend.runner.kv_pages import page_bytes
from backend.runner.memory_plan import MemoryPlan, plan_memory
from backend.runner.model_runner import ModelRunner
from backend.runner.placement import Placement, choose_placement
from backend.runner.torch_runner import TorchRunner
from backend.settings import Settings

Progress = Callable[[str, int, int], None]
_MOST_CPU_TOKENS = 65_536
_CPU_MEMORY_FRACTION = 0.8
_LOGITS_COPIES = 4
"""FP32 copies of the sampled rows' logits that sampling holds at once, at most."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded runner and the bounds of what it serves; `description` is for the log and the model's metadata."""

    runner: ModelRunner
    vocab_size: int
    max_model_len: int
    description: dict[str, str]


def make_runner(settings: Settings, progress: Progress) -> ServedModel:
    """Load the checkpoint of `settings` for this machine.

    `max_model_len` is lowered to what the KV pages hold and to what the checkpoint was made for, and the description says so.
    ConfigError when the checkpoint cannot be read or does not fit.
    """
    config = read_model_config(Path(settings.checkpoint))
    if settings.runner == "fake":
        num_pages = (settings.kv_cache_tokens or _MOST_CPU_TOKENS) // PAGE_TOKENS
        runner: ModelRunner = FakeRunner(num_pages=num_pages, max_num_seqs=settings.max_num_seqs)
        return _served(runner, config, settings, runner.describe())
    placement = choose_placement("auto", settings.weight_dtype, settings.kv_dtype)
    plan = _plan_for(placement, config, settings)
    max_model_len, _ = _served_length(config, settings, plan.num_pages)
    runner = TorchRunner(
        Path(settings.checkpoint),
        num_pages=plan.num_pages,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=max_model_len,
        device=str(placement.device),
        weight_dtype=settings.weight_dtype,
        kv_dtype=settings.kv_dtype,
        num_threads=settings.num_threads,
        progress=lambda done, total: progress("weights", done, total),
    )
    return _served(
        runner, config, settings, runner.describe() | plan.lines() | {"reason": _reason(settings, placement)}
    )


def _plan_for(placement: Placement, config: ModelConfig, settings: Settings) -> MemoryPlan:
    is_cpu = placement.device.type == "cpu"
    widest_row = max(config.hidden_size + 2 * config.ffn_size, config.query_size + 2 * config.kv_size)
    workspace_bytes = 4 * (
        settings.max_step_tokens * widest_row + _LOGITS_COPIES * settings.max_num_seqs * config.vocab_size
    )
    if is_cpu:
        budget_bytes = int(_available_host_bytes() * _CPU_MEMORY_FRACTION)
    else:
        budget_bytes = int(torch.cuda.mem_get_info(placement.device)[0] * settings.gpu_memory_fraction)
    return plan_memory(
        str(placement.device),
        budget_bytes,
        weight_bytes(config, placement.weight_dtype),
        workspace_bytes,
        page_bytes(config, placement.kv_dtype),
        kv_cache_tokens=settings.kv_cache_tokens,
        most_tokens=_MOST_CPU_TOKENS if is_cpu else None,
    )


def _served(runner: ModelRunner, config: ModelConfig, settings: Settings, description: dict[str, str]) -> ServedModel:
    max_model_len, why = _served_length(config, settings, runner.num_pages)
    return ServedModel(runner, config.vocab_size, max_model_len, description | {"max_model_len": why})


def _served_length(config: ModelConfig, settings: Settings, num_pages: int) -> tuple[int, str]:
    bounds = {"setting max_model_len": settings.max_model_len, "what the KV pages hold": num_pages * PAGE_TOKENS}
    if config.max_position_embeddings is not None:
        bounds["the checkpoint's max_position_embeddings"] = config.max_position_embeddings
    which = min(bounds, key=lambda name: bounds[name])
    return bounds[which], f"{bounds[which]:,} tokens ({which})"


def _reason(settings: Settings, placement: Placement) -> str:
    if settings.runner == "torch":
        return "asked for by the setting runner"
    return "no GPU was found" if placement.device.type == "cpu" else "this version has no CUDA engine of its own yet"


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
