"""Checks before anything starts: GPU, driver, memory, checkpoint, shared memory, temporary files; each finding has its remedy.

All findings are told together, so that one start shows everything there is to mend.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend.checkpoint.model_config import read_model_config
from backend.container.gpu import Gpu
from backend.errors import ConfigError
from backend.settings import Settings

log = logging.getLogger("nemo.check")
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_BYTES = 32 * 2**20
"""Ten times what the three stubs took, idle and with 64 streams (measured on server 2.51)."""
# Oldest driver for each major version of CUDA. Source: CUDA Toolkit release notes, "minimum required driver version".
MIN_DRIVERS = {12: "525.60.13", 13: "580.65.06"}
_MIN_BF16_CAPABILITY = (8, 0)
_LARGE_ON_CPU_BYTES = 4 * 10**9
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and how to mend it; `remedy` is empty when all is well."""

    what: str
    found: str
    remedy: str = ""
    is_fatal: bool = False


def report(findings: list[Finding]) -> bool:
    """Log every finding; whether the server may start."""
    for finding in findings:
        text = f"{finding.what}: {finding.found}" + (f"; {finding.remedy}" if finding.remedy else "")
        level = logging.ERROR if finding.is_fatal else logging.WARNING if finding.remedy else logging.INFO
        log.log(level, text, extra={"fields": {"check": finding.what}})
    return not any(finding.is_fatal for finding in findings)


def check_gpu(gpus: list[Gpu], *, is_required: bool, cuda_version: int | None) -> Iterator[Finding]:
    """Whether there is a GPU this package can use."""
    if not gpus:
        remedy = (
            "give the container one: `docker run --gpus all` with NVIDIA's container toolkit; in Kubernetes resources.limits "
            "nvidia.com/gpu, and runtimeClassName nvidia where that is not the default"
        )
        if is_required:
            yield Finding("gpu", "none that nvidia-smi sees", remedy, is_fatal=True)
        else:
            yield Finding("gpu", "none: the PyTorch engine runs on the CPU", "set REQUIRE_GPU=1 to refuse that")
        return
    gpu = gpus[0]
    yield Finding("gpu", f"{gpu.name}, {gpu.total_bytes / 2**30:.1f} GiB, driver {gpu.driver}")
    if len(gpus) > 1:
        yield Finding("gpu", f"{len(gpus)} are visible and one is used", "give each container one GPU")
    if gpu.compute_capability < _MIN_BF16_CAPABILITY:
        yield Finding(
            "gpu",
            f"compute capability {_dotted(gpu.compute_capability)} has no BF16 units",
            "use Ampere or newer, or be patient",
        )
    if gpu.used_bytes > gpu.total_bytes // 20:
        yield Finding(
            "gpu",
            f"{gpu.used_bytes / 2**30:.1f} GiB of it are taken by others",
            "end them (nvidia-smi lists them), or lower gpu_memory_fraction",
        )
    needed = MIN_DRIVERS.get(cuda_version or 0, "0")
    if _numbers(gpu.driver) < _numbers(needed):
        yield Finding(
            "driver",
            f"{gpu.driver} is older than CUDA {cuda_version} needs, {needed}",
            "update the driver on the host, or use CUDA's forward compatibility libraries (data centre GPUs)",
        )


def check_checkpoint(folder: Path) -> Iterator[Finding]:
    """Whether the folder holds a whole checkpoint that this user can read."""
    try:
        config = read_model_config(folder)
    except ConfigError as error:
        yield Finding("checkpoint", str(error), _checkpoint_remedy(folder), is_fatal=True)
        return
    problems = [
        *_missing_shards(folder),
        *(f"{path.name} is a pointer of git-lfs, not the file" for path in _weights(folder) if _is_pointer(path)),
        *(f"{path.name} cannot be read by user {os.getuid()}" for path in _weights(folder) if not os.access(path, os.R_OK)),
    ]  # fmt: skip
    if not any((folder / name).exists() for name in ("tekken.json", "tokenizer.json")):
        problems.append("there is neither tekken.json nor tokenizer.json")
    for problem in problems:
        yield Finding("checkpoint", f"{folder}: {problem}", _checkpoint_remedy(folder), is_fatal=True)
    if not problems:
        size = sum(path.stat().st_size for path in _weights(folder))
        yield Finding("checkpoint", f"{folder}: {config.num_layers} layers, {size / 1e9:.1f} GB of weights")


def check_memory(folder: Path, settings: Settings, gpus: list[Gpu]) -> Iterator[Finding]:
    """Whether the weights and at least a page of KV fit, before minutes are spent on loading."""
    if not gpus:
        size = sum(path.stat().st_size for path in _weights(folder))
        if size > _LARGE_ON_CPU_BYTES:
            yield Finding("memory", f"{size / 1e9:.1f} GB of weights on the CPU", "expect seconds a token; use a GPU")
        return
    from backend.plan import (
        plan_machine,  # brings torch, seconds that refusals and machines without a GPU need not wait
    )

    config = read_model_config(folder)
    is_fp8 = config.quantization is not None
    weights = settings.weight_dtype if settings.weight_dtype != "auto" else ("fp8" if is_fp8 else "bf16")
    has_kv_scales = config.quantization is not None and config.quantization.has_kv_scales
    kv = settings.kv_dtype if settings.kv_dtype != "auto" else ("fp8" if has_kv_scales else "bf16")
    arguments = argparse.Namespace(
        weights=weights,
        kv=kv,
        memory_fraction=settings.gpu_memory_fraction,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
    )
    try:
        plan = plan_machine(config, gpus[0].total_bytes, arguments)
    except ConfigError as error:
        yield Finding("memory", str(error), "use a larger GPU or narrower weights (weight_dtype)", is_fatal=True)
        return
    yield Finding("memory", "; ".join(plan.lines().values()))


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Whether Triton and its stubs have room to pass tensors."""
    try:
        room = os.statvfs(folder)
    except OSError as error:
        yield Finding("shared memory", f"{folder}: {error.strerror}", "mount a tmpfs there", is_fatal=True)
        return
    free = room.f_bavail * room.f_frsize
    if free < MIN_SHARED_MEMORY_BYTES:
        yield Finding(
            "shared memory",
            f"{folder} has {free / 2**20:.0f} MiB free, {MIN_SHARED_MEMORY_BYTES / 2**20:.0f} MiB are needed",
            "`docker run --shm-size=256m`; in Kubernetes an emptyDir of medium Memory at /dev/shm (the chart's sharedMemory)",
            is_fatal=True,
        )
    else:
        yield Finding("shared memory", f"{free / 2**20:.0f} MiB free")


def check_temporary_files() -> Iterator[Finding]:
    """Whether the run folder can be made; with a read-only root file system that needs a mount."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.NamedTemporaryFile():
            pass
    except OSError as error:
        yield Finding("temporary files", str(error), "mount a tmpfs or an emptyDir at /tmp", is_fatal=True)
        return
    yield Finding("temporary files", folder)


def torch_cuda_version() -> int | None:
    """The major version of CUDA that the installed torch was built for; None for a build without."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda[^=\n]*= '(\d+)\.", text, re.MULTILINE)
    return int(found[1]) if found else None


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _missing_shards(folder: Path) -> Iterator[str]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            yield f"{index.name} cannot be read"
            continue
        missing = sorted(name for name in names if not (folder / name).exists())
        if missing:
            yield f"{len(missing)} of {len(names)} shards are missing, the first is {missing[0]}"


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def _checkpoint_remedy(folder: Path) -> str:
    if folder.exists():
        return "fetch it again: `download` resumes what is incomplete (git clones need `git lfs pull`)"
    return "mount the model store there, or fetch it: `download hf://mistralai/Mistral-Nemo-Instruct-2407`"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
