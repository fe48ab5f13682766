"""Where the PyTorch runner computes, in which dtypes, and with how many threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.errors import ConfigError, shown

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Placement:
    """Device and dtypes, decided."""

    device: torch.device
    weight_dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def weight_dtype_name(self) -> str:
        """As the setting names it."""
        return _NAMES[self.weight_dtype]

    @property
    def kv_dtype_name(self) -> str:
        """As the setting names it."""
        return _NAMES[self.kv_dtype]


def choose_placement(device: str = "auto", weight_dtype: str = "auto", kv_dtype: str = "auto") -> Placement:
    """Decide what `auto` means: the first CUDA device if any; FP32 on the CPU, BF16 elsewhere; KV as the weights.

    ConfigError for a device this machine has not, or an unknown dtype.
    """
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:<index>, got {shown(device)}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:<index>, got {shown(device)}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {shown(device)} is not there, PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    weights = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    if weight_dtype != "auto":
        weights = _parse_dtype("weight_dtype", weight_dtype)
    return Placement(chosen, weights, weights if kv_dtype == "auto" else _parse_dtype("kv_dtype", kv_dtype))


def num_physical_cores() -> int:
    """Physical cores this process may run on: logical ones that share a core (hyper-threads) count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def default_num_threads() -> int:
    """One thread a physical core, but for one that is left to the server.

    With a thread on every core, each step waits at its barriers for whatever else runs: on two cores, 16 decode rows took 404 ms
    instead of 5 beside one busy process, and about 6.5 with one thread.
    """
    return max(1, num_physical_cores() - 1)


def _parse_dtype(setting: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"{setting}: must be one of auto, {', '.join(_DTYPES)}, got {shown(name)}")
    return _DTYPES[name]
