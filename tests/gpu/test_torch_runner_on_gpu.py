"""The PyTorch runner on a GPU: logits near those of the CPU's tiled arithmetic, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.launch import Device

pytest.importorskip("safetensors")
pytest.importorskip("msgspec")
pytest.importorskip("llguidance")

from backend.runner.placement import Arithmetic
from tests.checkpoints import make_checkpoint
from tests.unit.runner.test_gpu_arithmetic import logits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "bound"), [("bf16", "bf16", 0.05), ("bf16", "fp8", 0.3), ("fp8", "fp8", 0.3)]
)
def test_logits_are_near_those_of_the_cpu(
    tmp_path: Path, device: Device, is_emulated: bool, dtype: str, kv_dtype: str, bound: float
) -> None:
    """BF16 loses 2^-9 here and there, e4m3 pages and inputs that round the other way 2^-4; without one, on the CPU."""
    folder = make_checkpoint(tmp_path, num_layers=1, dtype=torch.bfloat16)
    expected = logits(folder, None, weight_dtype=dtype, kv_dtype=kv_dtype)
    arithmetic = Arithmetic(is_tiled=False, has_scaled_mm=True) if is_emulated else None
    actual = logits(folder, arithmetic, device=str(device.torch_device), weight_dtype=dtype, kv_dtype=kv_dtype)
    relative = float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    print(f"weights {dtype}, KV {kv_dtype}: relative error {relative:.4f}")
    assert relative < bound
