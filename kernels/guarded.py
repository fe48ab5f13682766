"""Inputs of a launch on a device, each between canaries, so that what was written beside a tensor shows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.op import Inputs, Op

# 0xFF in every byte is NaN in FP32, FP16, BF16 and e4m3, and -1 in integers.
_POISON = 0xFF
_CANARY = 0xA5
_GUARD_BYTES = 256


@dataclass(frozen=True)
class _Guarded:
    memory: torch.Tensor
    tensor: torch.Tensor

    def is_intact(self) -> bool:
        """Whether nothing was written before or behind the tensor."""
        start = self.tensor.data_ptr() - self.memory.data_ptr()
        end = start + self.tensor.numel() * self.tensor.element_size()
        return all(bool((part == _CANARY).all()) for part in (self.memory[:start], self.memory[end:]))


class GuardedInputs:
    """Copies of an operation's inputs; outputs and scratch hold poison."""

    def __init__(self, op: Op, inputs: Inputs, device: torch.device) -> None:
        self._guarded = {
            name: _place(value, device, is_poisoned=name in (*op.outputs, *op.scratch))
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        self.arguments: Inputs = inputs | {name: guarded.tensor for name, guarded in self._guarded.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, on the CPU."""
        return {name: guarded.tensor.cpu() for name, guarded in self._guarded.items()}

    def overwritten(self) -> list[str]:
        """Names of the tensors beside which something was written."""
        return [name for name, guarded in self._guarded.items() if not guarded.is_intact()]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as one row, for comparisons in which NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _place(value: torch.Tensor, device: torch.device, *, is_poisoned: bool) -> _Guarded:
    num_bytes = value.numel() * value.element_size()
    memory = torch.full((num_bytes + 3 * _GUARD_BYTES,), _CANARY, dtype=torch.uint8, device=device)
    # At a multiple of 256 bytes, as torch's own allocations on a GPU.
    start = _GUARD_BYTES + -memory.data_ptr() % _GUARD_BYTES
    inside = memory[start : start + num_bytes]
    if is_poisoned:
        inside.fill_(_POISON)
    else:
        inside.copy_(as_bytes(value))
    return _Guarded(memory, inside.view(value.dtype).view(value.shape))
