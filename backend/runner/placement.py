"""Where the PyTorch runner computes, in which dtypes, and with how many threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.checkpoint import fp8
from backend.checkpoint.matrix import WeightFormat
from backend.checkpoint.quantization import Quantization
from backend.errors import ConfigError, shown

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": fp8.DTYPE}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


FP8_CAPABILITY = (8, 9)
"""The first compute capability whose tensor cores multiply e4m3 (Ada Lovelace)."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a device computes.

    `is_tiled`: products of fixed shapes in FP32 and attention page by page, batch-invariant: the CPU. Else what PyTorch's
    libraries choose for a shape: cuBLAS, scaled_dot_product_attention. `has_scaled_mm`: they multiply e4m3 values.
    """

    is_tiled: bool
    has_scaled_mm: bool = False

    def describe(self) -> dict[str, str]:
        """For the log and the model's metadata."""
        if self.is_tiled:
            return {}
        products = (
            "torch._scaled_mm" if self.has_scaled_mm else "values widened to BF16: this device has no FP8 products"
        )
        return {"attention": "scaled_dot_product_attention over gathered pages", "fp8_products": products}


TILED = Arithmetic(is_tiled=True)


@dataclass(frozen=True, slots=True)
class Placement:
    """Device, arithmetic and dtypes, decided."""

    device: torch.device
    arithmetic: Arithmetic
    weight_format: WeightFormat
    kv_dtype: torch.dtype


def choose_placement(
    device: str = "auto",
    weight_dtype: str = "auto",
    kv_dtype: str = "auto",
    head_dtype: str = "auto",
    quantization: Quantization | None = None,
    arithmetic: Arithmetic | None = None,
) -> Placement:
    """Decide what `auto` means for a checkpoint of `quantization`.

    Device: the first CUDA device if any. Weights: FP8 when the checkpoint's are, else FP32 on the CPU and BF16 elsewhere.
    Head: FP8 when the checkpoint's is, else as the embedding, which is never FP8. KV: FP8 when the checkpoint has scales
    for it, else as the embedding. `arithmetic` None: the device's own; tests run a GPU's on the CPU.
    ConfigError for a device this machine has not, or an unknown dtype.
    """
    chosen = _choose_device(device)
    arithmetic = arithmetic or _arithmetic_of(chosen)
    kept, kv = choose_dtypes(
        torch.float32 if arithmetic.is_tiled else torch.bfloat16,
        torch.float32 if arithmetic.is_tiled else fp8.DTYPE,
        weight_dtype,
        kv_dtype,
        head_dtype,
        quantization,
    )
    return Placement(chosen, arithmetic, kept, kv)


def choose_dtypes(
    usual: torch.dtype,
    fp8_values: torch.dtype,
    weight_dtype: str,
    kv_dtype: str,
    head_dtype: str,
    quantization: Quantization | None,
) -> tuple[WeightFormat, torch.dtype]:
    """What weights and KV pages are held in, where `usual` is what `auto` means for a checkpoint that is not quantised."""
    weights = _parse_dtype("weight_dtype", weight_dtype, usual if quantization is None else fp8.DTYPE)
    dense = usual if weights == fp8.DTYPE else weights
    is_head_quantised = quantization is not None and quantization.quantises("lm_head") and weights == fp8.DTYPE
    head = _parse_dtype("head_dtype", head_dtype, fp8.DTYPE if is_head_quantised else dense)
    if head not in (dense, fp8.DTYPE):
        raise ConfigError(
            f"head_dtype: must be auto, fp8 or as the embedding, which is {_NAMES[dense]} here, got {shown(head_dtype)}"
        )
    has_kv_scales = quantization is not None and quantization.has_kv_scales
    kept = WeightFormat(dense, weights == fp8.DTYPE, head == fp8.DTYPE, fp8_values)
    return kept, _parse_dtype("kv_dtype", kv_dtype, fp8.DTYPE if has_kv_scales else dense)


def describe_dtypes(kept: WeightFormat, kv: torch.dtype, quantization: Quantization | None) -> dict[str, str]:
    """The dtypes as the settings name them, and where FP8 comes from."""
    dense = _NAMES[kept.dense]
    dtypes = {
        "weight_dtype": "fp8" if kept.has_fp8_linears else dense,
        "head_dtype": "fp8" if kept.has_fp8_head else dense,
        "kv_dtype": _NAMES[kv],
    }
    if kept.has_fp8_linears and quantization is None:
        origin = "while loading: e4m3 weights with a scale a row, inputs with a scale a token"
    elif kept.has_fp8_linears and quantization is not None:
        inputs = "the checkpoint's scales" if quantization.has_static_activations else "a scale a token"
        scales = f"a weight scale a {quantization.weight_scales}, inputs with {inputs}"
        origin = f"the checkpoint's ({quantization.name}, {scales})"
    elif quantization is not None:
        origin = f"the checkpoint's ({quantization.name}) was undone while loading"
    else:
        return dtypes
    return dtypes | {"quantization": origin}


def _arithmetic_of(device: torch.device) -> Arithmetic:
    if device.type == "cpu":
        return TILED
    return Arithmetic(is_tiled=False, has_scaled_mm=torch.cuda.get_device_capability(device) >= FP8_CAPABILITY)


def _choose_device(device: str) -> torch.device:
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
    return chosen


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


def _parse_dtype(setting: str, name: str, auto: torch.dtype) -> torch.dtype:
    if name == "auto":
        return auto
    if name not in _DTYPES:
        raise ConfigError(f"{setting}: must be one of auto, {', '.join(_DTYPES)}, got {shown(name)}")
    return _DTYPES[name]
