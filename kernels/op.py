"""What every operation says about itself, so that checks, benches, tests and the table need no code of their own for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.launch import Program

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of sizes: `sizes` by shape letter, `options` for what else `make_inputs` must know.

    `is_emulated`: small enough for the emulator. `is_timed`: a size that users run, for `python -m kernels bench`.
    """

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    is_emulated: bool = True
    is_timed: bool = False


# Dense rates of the tensor cores of an H100 or H200 SXM, by NVIDIA's datasheets.
HALF_FLOP_PER_US = 989e6
FP8_FLOP_PER_US = 1979e6


@dataclass(frozen=True)
class Cost:
    """What a case must do at least: floating-point operations, and bytes from and to device memory.

    `flop_per_us` is the rate of the tensor cores for them; None: they are too few to matter.
    """

    flops: int
    bytes: int
    flop_per_us: float | None = None

    def floor_us(self, bytes_per_us: float) -> float:
        """Microseconds that the case takes at least, with this bandwidth.

        >>> Cost(flops=2 * 989_000_000, bytes=4_300_000, flop_per_us=HALF_FLOP_PER_US).floor_us(4.3e6)
        2.0
        """
        of_flops = 0.0 if self.flop_per_us is None else self.flops / self.flop_per_us
        return max(self.bytes / bytes_per_us, of_flops)


@dataclass(frozen=True)
class Op:
    """One operation: `kernels/<name>.cu` and `kernels/<name>.py`.

    launch: the launcher; called as `launch(device, **inputs)`
    make_inputs: case, seed -> every keyword argument of the launcher, tensors on the CPU, outputs among them
    reference: called as `reference(**inputs)` with what the launcher would get; name -> expected value of each output and
        updated tensor, in FP32 or FP64 (integers for integer ones)
    bounds: inputs, expected -> name -> largest |difference| allowed, as a number or elementwise; 0 is equality
    cost: what the case moves and computes at least
    programs: what `make kernels` builds ahead, for Mistral NeMo's sizes
    outputs: tensors written in full; updated: tensors that are changed in place; scratch: tensors whose content means
        nothing before and after
    rows: tensors whose first dimension is the row, when a row must not depend on the others; none: it may
    instructions: beginnings of SASS mnemonics that the compiled programs must have (HGMMA, UBLKCP, ...)
    """

    name: str
    formula: str
    launch: Callable[..., None]
    make_inputs: Callable[[Case, int], Inputs]
    reference: Callable[..., dict[str, torch.Tensor]]
    bounds: Callable[[Inputs, dict[str, torch.Tensor]], Mapping[str, torch.Tensor | float]]
    cost: Callable[[Case], Cost]
    cases: tuple[Case, ...]
    programs: tuple[Program, ...]
    outputs: tuple[str, ...]
    updated: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
