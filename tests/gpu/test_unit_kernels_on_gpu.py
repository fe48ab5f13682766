"""Every function of hopper.cuh does on the GPU what the PTX ISA says, and what the emulator does, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kernels.launch import Device
from tests.gpu.emulation import emulator, why_not_emulated
from tests.kernels.unit import Unit, bits
from tests.kernels.units import ALL

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("unit", ALL, ids=lambda unit: unit.name)
def test_unit(unit: Unit, device: Device) -> None:
    found = unit.run(device)
    unit.check(found)
    # Approximating instructions may differ from the CPU's functions in their last bits.
    if unit.tolerance == 0 and why_not_emulated() is None:
        for name, emulated in unit.run(emulator()).items():
            assert torch.equal(torch.from_numpy(bits(found[name])), torch.from_numpy(bits(emulated))), name
