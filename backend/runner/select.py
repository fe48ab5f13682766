"""Chooses the ModelRunner for this machine, plans its memory, and loads it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint.model_config import ModelConfig, read_model_config
from backend.checkpoint.weights import weight_bytes
from backend.engine.plan import PAGE_TOKENS
from backend.errors import ConfigError
from backend.phases import Phases
from backend.runner.cuda.programs import programs_of
from backend.runner.cuda.runner import CudaRunner, cuda_workspace_bytes
from backend.runner.cuda.warm_up import step_sizes
from backend.runner.fake_runner import FakeRunner
from backend.runner.gathered_attention import gathered_page_bytes
from backend.runner.memory_plan import MemoryPlan, page_bytes, plan_memory, workspace_bytes
from backend.runner.model_runner import ModelRunner
from backend.runner.placement import Placement, choose_placement
from backend.runner.torch_runner import TorchRunner
from backend.runner.warm_up import Limits, run_steps
from backend.settings import Settings
from kernels.program import COMPUTE_CAPABILITY

log = logging.getLogger("nemo.engine")
Progress = Callable[[str, int, int], None]
_MOST_CPU_TOKENS = 65_536
_CPU_MEMORY_FRACTION = 0.8
_CPU_STEP_TIMEOUT_S = 120.0
_GPU_STEP_TIMEOUT_S = 8.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded runner and the bounds of what it serves; `description` is for the log and the model's metadata."""

    runner: ModelRunner
    vocab_size: int
    max_model_len: int
    step_timeout_s: float
    has_guides: bool
    description: dict[str, str]


def make_runner(settings: Settings, progress: Progress, phases: Phases) -> ServedModel:
    """Load the checkpoint of `settings` for this machine; `phases` gets the seconds of what that takes.

    `max_model_len` is lowered to what the KV pages hold and to what the checkpoint was made for, and the description says so.
    ConfigError when the checkpoint cannot be read or does not fit.
    """
    config = read_model_config(Path(settings.checkpoint))
    if settings.runner == "fake":
        return _fake(settings, config)
    if settings.runner == "cuda":
        return _cuda(settings, config, progress, phases)
    placement = choose_placement(
        "auto", settings.weight_dtype, settings.kv_dtype, settings.head_dtype, config.quantization
    )
    needed_bytes = workspace_bytes(config, settings.max_step_tokens, settings.max_num_seqs)
    gathered = 0 if placement.arithmetic.is_tiled else gathered_page_bytes(config, placement.kv_dtype.itemsize)
    plan = _plan_for(placement, config, settings, needed_bytes, gathered)
    num_host_pages = _num_host_pages(settings, plan)
    max_model_len, why = _served_length(config, settings, plan.num_pages)
    runner = TorchRunner(
        Path(settings.checkpoint),
        num_pages=plan.num_pages,
        num_host_pages=num_host_pages,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=max_model_len,
        device=str(placement.device),
        weight_dtype=settings.weight_dtype,
        kv_dtype=settings.kv_dtype,
        head_dtype=settings.head_dtype,
        num_threads=settings.num_threads,
        progress=lambda done, total: progress("weights", done, total),
        phases=phases,
    )
    phases.end("memory")
    description = runner.describe() | plan.lines(num_host_pages)
    description |= {"max_model_len": why, "reason": _reason(settings, placement)}
    step_timeout_s = _CPU_STEP_TIMEOUT_S if placement.device.type == "cpu" else _GPU_STEP_TIMEOUT_S
    return ServedModel(runner, config.vocab_size, max_model_len, step_timeout_s, True, description)


def _cuda(settings: Settings, config: ModelConfig, progress: Progress, phases: Phases) -> ServedModel:
    """On our own kernels; ConfigError on another GPU than a Hopper."""
    from kernels.build import (
        build,
    )  # NOTE: here, because nobody else needs the bindings of the CUDA driver and of NVRTC
    from kernels.driver import CudaDevice
    from kernels.errors import LaunchError

    try:
        device = CudaDevice()
    except LaunchError as error:
        raise ConfigError(f"setting runner: cuda cannot run here: {error}; use torch or auto") from error
    phases.end("device")
    placement = choose_placement(
        str(device.torch_device), settings.weight_dtype, settings.kv_dtype, settings.head_dtype, config.quantization
    )
    needed_bytes = cuda_workspace_bytes(config, settings.max_num_seqs, settings.max_model_len, settings.max_step_tokens)
    plan = _plan_for(placement, config, settings, needed_bytes)
    num_host_pages = _num_host_pages(settings, plan)
    max_model_len, why = _served_length(config, settings, plan.num_pages)

    def compile_programs() -> int:
        programs = programs_of(
            config,
            placement.weight_format,
            is_fp8_kv=placement.kv_dtype == torch.float8_e4m3fn,
            max_num_seqs=settings.max_num_seqs,
            max_step_tokens=settings.max_step_tokens,
        )
        return build(programs, report=log.info)

    compiling = ThreadPoolExecutor(1, thread_name_prefix="kernels")
    try:
        compiled = compiling.submit(compile_programs)
        runner = CudaRunner.load(
            Path(settings.checkpoint),
            device,
            num_pages=plan.num_pages,
            num_host_pages=num_host_pages,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=max_model_len,
            max_step_tokens=settings.max_step_tokens,
            weight_dtype=settings.weight_dtype,
            kv_dtype=settings.kv_dtype,
            head_dtype=settings.head_dtype,
            progress=lambda done, total: progress("weights", done, total),
            phases=phases,
        )
        phases.end("memory")
        compiled.result()
        phases.end("kernels")
    finally:
        compiling.shutdown(wait=False)  # a checkpoint that is refused is not to wait for them
    limits = Limits(settings.max_num_seqs, max_model_len, plan.num_pages, config.vocab_size)
    sizes = list(step_sizes(settings.max_num_seqs, settings.max_step_tokens))
    num_steps = run_steps(runner, sizes, limits)
    phases.end("warm-up")
    description = runner.describe() | plan.lines(num_host_pages)
    description |= {"warm_up": f"{num_steps} of {len(sizes)} steps"}
    description |= {"max_model_len": why, "reason": "asked for by the setting runner; not yet run on hardware by us"}
    return ServedModel(runner, config.vocab_size, max_model_len, _GPU_STEP_TIMEOUT_S, True, description)


def _fake(settings: Settings, config: ModelConfig) -> ServedModel:
    num_pages = (settings.kv_cache_tokens or _MOST_CPU_TOKENS) // PAGE_TOKENS
    runner = FakeRunner(
        num_pages=num_pages,
        num_host_pages=int(num_pages * settings.kv_swap_ratio),
        max_num_seqs=settings.max_num_seqs,
    )
    max_model_len, why = _served_length(config, settings, num_pages)
    description = runner.describe() | {"max_model_len": why}
    return ServedModel(runner, config.vocab_size, max_model_len, _GPU_STEP_TIMEOUT_S, False, description)


def _num_host_pages(settings: Settings, plan: MemoryPlan) -> int:
    """As many as asked for, within half of the host memory there is besides what the device plan takes of it."""
    is_cpu = plan.device == "cpu"
    taken = plan.weight_bytes + plan.workspace_bytes + plan.num_pages * plan.page_bytes if is_cpu else 0
    most = max(0, available_host_bytes() - taken) // 2 // plan.page_bytes
    return min(int(plan.num_pages * settings.kv_swap_ratio), most)


def _plan_for(
    placement: Placement, config: ModelConfig, settings: Settings, needed_bytes: int, gathered_page_bytes: int = 0
) -> MemoryPlan:
    is_cpu = placement.device.type == "cpu"
    if is_cpu:
        budget_bytes = int(available_host_bytes() * _CPU_MEMORY_FRACTION)
    else:
        budget_bytes = int(torch.cuda.mem_get_info(placement.device)[0] * settings.gpu_memory_fraction)
    return plan_memory(
        str(placement.device),
        budget_bytes,
        weight_bytes(config, placement.weight_format),
        needed_bytes,
        page_bytes(config, placement.kv_dtype.itemsize),
        kv_cache_tokens=settings.kv_cache_tokens,
        most_tokens=_MOST_CPU_TOKENS if is_cpu else None,
        gathered_page_bytes=gathered_page_bytes,
        max_model_len=settings.max_model_len,
    )


def _served_length(config: ModelConfig, settings: Settings, num_pages: int) -> tuple[int, str]:
    bounds = {"setting max_model_len": settings.max_model_len, "what the KV pages hold": num_pages * PAGE_TOKENS}
    if config.max_position_embeddings is not None:
        bounds["the checkpoint's max_position_embeddings"] = config.max_position_embeddings
    which = min(bounds, key=lambda name: bounds[name])
    return bounds[which], f"{bounds[which]:,} tokens ({which})"


def _reason(settings: Settings, placement: Placement) -> str:
    if settings.runner == "torch":
        return "asked for by the setting runner"
    if placement.device.type == "cpu":
        return "no GPU was found"
    capability = torch.cuda.get_device_capability(placement.device)
    if capability == COMPUTE_CAPABILITY:
        return "our own CUDA engine has not been run on hardware yet"
    needed, found = (".".join(map(str, each)) for each in (COMPUTE_CAPABILITY, capability))
    return f"our own CUDA engine is for compute capability {needed} (Hopper), this GPU has {found}"


def available_host_bytes() -> int:
    """Memory this machine can give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
