"""Every case of every operation on the GPU; the small ones also in the emulator, whose bits should be the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.check import check_case
from kernels.guarded import GuardedInputs, as_bytes
from kernels.launch import Device
from kernels.op import Case, Op
from kernels.ops import OPS
from tests.gpu.emulation import emulator, why_not_emulated

pytestmark = pytest.mark.gpu

CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_case(
    op: Op, case: Case, device: Device, is_emulated: bool, record_property: Callable[[str, object], None]
) -> None:
    if is_emulated and not case.is_emulated:
        pytest.skip("too large for the emulator")
    record_property("op", op.name)
    result = check_case(op, case, device)
    record_property("error_share", f"{result.worst_share:.3f}")
    # Within the bound is what counts; whether the bits are the emulator's is told in the table.
    if case.is_emulated and why_not_emulated() is None:
        inputs = op.make_inputs(case, 0)
        on_both = [results(op, inputs, where) for where in (device, emulator())]
        differing = [name for name in on_both[0] if not torch.equal(on_both[0][name], on_both[1][name])]
        record_property("differs", " ".join(differing))


def results(op: Op, inputs: dict[str, object], device: Device) -> dict[str, torch.Tensor]:
    guarded = GuardedInputs(op, inputs, device.torch_device)
    op.launch(device, **guarded.arguments)
    device.synchronize()
    written = {*op.outputs, *op.updated}
    return {name: as_bytes(tensor) for name, tensor in guarded.tensors().items() if name in written}
