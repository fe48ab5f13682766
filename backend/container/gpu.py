"""The GPUs of this machine, as `nvidia-smi` tells: no CUDA context is made and torch is not loaded."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_QUERY = "name,compute_cap,memory.total,memory.used,driver_version"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; memory in bytes."""

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    used_bytes: int
    driver: str


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs in nvidia-smi's CSV without header and units.

    >>> parse_gpus("NVIDIA H100 80GB HBM3, 9.0, 81559, 4, 570.86.15")[0].compute_capability
    (9, 0)
    """
    gpus = []
    for line in text.strip().splitlines():
        name, capability, total, used, driver = (part.strip() for part in line.split(","))
        major, minor = capability.split(".")
        gpus.append(Gpu(name, (int(major), int(minor)), int(total) * _MIB, int(used) * _MIB, driver))
    return gpus


def find_gpus() -> list[Gpu]:
    """The GPUs this process sees; none when nvidia-smi is missing or fails. OSError when its words make no sense."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return []
    try:
        return parse_gpus(done.stdout)
    except ValueError as error:
        raise OSError(f"nvidia-smi said {done.stdout.strip()!r}") from error
