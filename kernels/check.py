"""Runs an operation's cases on a device and holds the results against the reference.

Outputs are poisoned with NaN and stand between canaries, what is only read must not change, a second run must give the same
bits, and where rows do not depend on each other a row alone must give the same bits as in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.errors import CheckError
from kernels.guarded import GuardedInputs, as_bytes
from kernels.launch import Device
from kernels.op import Case, Inputs, Op


@dataclass(frozen=True)
class CheckResult:
    """A case that passed. `worst_share` is the largest |error| / bound over all outputs; 0 where equality is asked for."""

    case: Case
    worst_share: float


def check_case(op: Op, case: Case, device: Device, seed: int = 0) -> CheckResult:
    """CheckError names operation, case, tensor and the first wrong element; LaunchError comes from the device."""
    inputs = op.make_inputs(case, seed)
    found = _run(op, case, device, inputs)
    worst_share = _compare(op, case, inputs, found)
    again = _run(op, case, device, inputs)
    for name in _written(op, inputs):
        if not torch.equal(as_bytes(found[name]), as_bytes(again[name])):
            raise CheckError(f"{op.name}, {case.name}: {name} differs between two runs on the same inputs")
    _check_rows(op, case, device, inputs, found)
    return CheckResult(case, worst_share)


def _run(op: Op, case: Case, device: Device, inputs: Inputs) -> dict[str, torch.Tensor]:
    guarded = GuardedInputs(op, inputs, device.torch_device)
    op.launch(device, **guarded.arguments)
    device.synchronize()
    if overwritten := guarded.overwritten():
        raise CheckError(f"{op.name}, {case.name}: something was written beside {', '.join(overwritten)}")
    found = guarded.tensors()
    written = (*op.outputs, *op.updated, *op.scratch)
    for name, tensor in found.items():
        if name not in written and not torch.equal(as_bytes(tensor), as_bytes(inputs[name])):
            raise CheckError(f"{op.name}, {case.name}: {name} has changed and is neither output nor updated")
    return found


def _written(op: Op, inputs: Inputs) -> list[str]:
    return [name for name in (*op.outputs, *op.updated) if inputs[name] is not None]


def _compare(op: Op, case: Case, inputs: Inputs, found: dict[str, torch.Tensor]) -> float:
    expected = op.reference(**inputs)
    bounds = op.bounds(inputs, expected)
    worst_share = 0.0
    for name in _written(op, inputs):
        if name not in expected:
            if name in op.outputs or not torch.equal(as_bytes(found[name]), as_bytes(inputs[name])):
                raise CheckError(
                    f"{op.name}, {case.name}: {name} was written and the reference does not say what it is"
                )
            continue
        got, want = _comparable(found[name]), _comparable(expected[name])
        if got.shape != want.shape:
            raise CheckError(f"{op.name}, {case.name}: the reference of {name} has shape {list(want.shape)}")
        if not want.numel():
            continue
        # Equal infinities have no difference, and where NaN is expected NaN is right.
        is_same = (got == want) | (got.isnan() & want.isnan())
        error = torch.where(is_same, 0.0, (got - want).abs())
        bound = torch.as_tensor(bounds[name], dtype=torch.float64).expand_as(error)
        if (wrong := ~(error <= bound)).any():
            where = tuple(int(index) for index in wrong.nonzero()[0])
            raise CheckError(
                f"{op.name}, {case.name}: {name}{list(where)} is {got[where].item()!r}, expected {want[where].item()!r} "
                f"within {bound[where].item():.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
            )
        share = torch.where(error > 0, error / bound, 0.0)
        worst_share = max(worst_share, float(share.max()))
    return worst_share


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    # 64-bit integers beyond 2^53 would lose bits; no operation gives any.
    return tensor.float().double() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor.double()


def _check_rows(op: Op, case: Case, device: Device, inputs: Inputs, found: dict[str, torch.Tensor]) -> None:
    row_tensors = [name for name in op.rows if inputs[name] is not None]
    num_rows = len(inputs[row_tensors[0]]) if row_tensors else 0
    if num_rows < 2:
        return
    for row in sorted({0, num_rows // 2, num_rows - 1}):
        alone = inputs | {name: inputs[name][row : row + 1] for name in row_tensors}
        found_alone = _run(op, case, device, alone)
        for name in _written(op, inputs):
            if name in row_tensors and not torch.equal(as_bytes(found_alone[name][0]), as_bytes(found[name][row])):
                raise CheckError(f"{op.name}, {case.name}: {name}[{row}] alone differs from the same row in the batch")
