"""Linear layers for many rows (prefill), FP8 or BF16: y = x W^T at the speed of the tensor cores, the bits of skinny_gemm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kernels import skinny_gemm
from kernels.arguments import Buffer, Swizzle, TensorMap, int32
from kernels.contract import check_size
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Inputs, Op
from kernels.skinny_gemm import check_linear, num_segments, operand_map, skinny_gemm_reference

CLUSTER_BLOCKS = 2
TILE_TOKENS = (64, 96, 128, 160, 192, 256)
_GROUP_OUTPUTS = 64
_BLOCK_OUTPUTS = 2 * _GROUP_OUTPUTS
_TILE_OUTPUTS = CLUSTER_BLOCKS * _BLOCK_OUTPUTS
_STAGE_BYTES_OF_K = 128
_MIN_STAGES, _MAX_STAGES = 3, 6
_RASTER_TOKENS = 8
_NUM_THREADS = 384
# Registers of a thread that sums may take, of 232; two sets of tokens / 2 each, one where the tensor core adds up all of K.
_SUM_REGISTERS = 192
# What a block may take of an SM (227 KB), less its barriers, scales and the alignment of what follows them.
_SHARED_BYTES = (227 - 4) * 1024
# Plans are made for this many SMs (H100 and H200 SXM), so that a tile size does not change with the machine.
_NUM_SMS = 132
_NUM_CLUSTERS = _NUM_SMS // CLUSTER_BLOCKS


@dataclass(frozen=True)
class LargePlan:
    """How [M, N, K] is cut: a cluster of two blocks computes tiles of 256 outputs x `tokens`, one after the other.

    `segments` are skinny_gemm's, of N and K alone; `tokens` does not change results. `tile_clocks`: how long a tile takes
    when shared memory, the narrowest place, is busy all the time; `tensor_clocks`: what its products need of that.
    """

    tokens: int
    segments: int
    stages: int
    shared_bytes: int
    num_rows: int
    num_outputs: int
    num_inputs_bytes: int
    tile_clocks: int
    tensor_clocks: int

    @property
    def num_tiles(self) -> int:
        """Tiles of a cluster, the cut ones at the edges too."""
        return math.ceil(self.num_outputs / _TILE_OUTPUTS) * math.ceil(self.num_rows / self.tokens)

    @property
    def num_waves(self) -> int:
        """Tiles that the busiest cluster computes."""
        return math.ceil(self.num_tiles / _NUM_CLUSTERS)

    @property
    def clocks(self) -> int:
        """Of the busiest cluster."""
        return self.num_waves * self.tile_clocks

    @property
    def wave_efficiency(self) -> float:
        """Useful outputs over what all clusters could have computed in the same waves of whole tiles."""
        return self.num_rows * self.num_outputs / (self.num_waves * _NUM_CLUSTERS * self.tokens * _TILE_OUTPUTS)

    @property
    def tensor_share(self) -> float:
        """Share of the tensor cores' peak that this plan could reach on 132 SMs."""
        return self.wave_efficiency * self.tensor_clocks / self.tile_clocks

    def __str__(self) -> str:
        return (
            f"{self.num_tiles} tiles of {_TILE_OUTPUTS} outputs x {self.tokens} rows in {self.num_waves} waves, "
            f"{self.segments} segments, {self.stages} stages, {self.shared_bytes // 1024} KB a block, "
            f"waves {self.wave_efficiency:.0%} full, at most {self.tensor_share:.0%} of the tensor cores' peak"
        )


def plan_large_gemm(
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    *,
    is_fp8: bool,
    is_float_out: bool = False,
    tile_tokens: int | None = None,
) -> LargePlan:
    """The fastest plan by its clocks, or the one with `tile_tokens`; ContractError if there is none.

    >>> print(plan_large_gemm(8192, 28672, 5120, is_fp8=True))
    4816 tiles of 256 outputs x 192 rows in 73 waves, 1 segments, 4 stages, 208 KB a block, waves 99% full, at most 89% of \
the tensor cores' peak
    """
    stage_k = _STAGE_BYTES_OF_K // (1 if is_fp8 else 2)
    check_size("large_gemm", "M", num_rows, at_least=1)
    check_size("large_gemm", "N", num_outputs, multiple_of=_GROUP_OUTPUTS, at_least=_GROUP_OUTPUTS)
    check_size("large_gemm", "K", num_inputs, multiple_of=stage_k, at_least=stage_k)
    num_intervals = num_inputs // stage_k
    segments = num_segments(num_outputs, num_intervals)
    has_totals = is_fp8 and segments > 1
    plans = []
    for tokens in TILE_TOKENS:
        staging_bytes = tokens * _BLOCK_OUTPUTS * (4 if is_float_out or has_totals else 2)
        stage_bytes = (_BLOCK_OUTPUTS + tokens) * _STAGE_BYTES_OF_K
        stages = min((_SHARED_BYTES - staging_bytes) // stage_bytes, _MAX_STAGES)
        num_sets = 2 if is_fp8 or segments > 1 else 1
        if stages < _MIN_STAGES or num_sets * tokens // 2 > _SUM_REGISTERS or tile_tokens not in (None, tokens):
            continue
        # In clocks of an SM, which reads or writes 128 bytes of shared memory in each. Of an interval: two warpgroups, four
        # instructions of (64 + tokens) * 32 bytes each, and the copy that brought them. Of a tile: totals, results.
        shared = num_intervals * (2 * 4 * (_GROUP_OUTPUTS + tokens) * 32 + stage_bytes) // 128
        totals = (segments - 1) * 2 * tokens * _BLOCK_OUTPUTS * 4 // 128 if has_totals else 0
        tensor = num_intervals * 2 * 4 * tokens // 2
        tile_clocks = max(shared + totals, tensor) + 2 * staging_bytes // 128
        plans.append(
            LargePlan(
                tokens,
                segments,
                stages,
                stages * stage_bytes + staging_bytes,
                num_rows,
                num_outputs,
                num_inputs,
                tile_clocks,
                tensor,
            )
        )
    if not plans:
        raise ContractError(f"large_gemm: tile_tokens is {tile_tokens}, expected one of {TILE_TOKENS} that fits")
    return min(plans, key=lambda plan: (plan.clocks, -plan.tokens))


def large_gemm(
    device: Device,
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: torch.Tensor,
    tile_tokens: int | None = None,
) -> None:
    """out = (x W^T) * x_scale * weight_scale + residual, for any number of rows, bit for bit what `skinny_gemm` gives.

    The arguments of `skinny_gemm`, and the width of a tile (None: what the plan takes), which does not change results.

    ContractError.
    """
    operands = check_linear(
        "large_gemm",
        device,
        x=x,
        weight=weight,
        x_scale=x_scale,
        weight_scale=weight_scale,
        residual=residual,
        out=out,
        num_rows=num_rows,
    )
    rows, outputs, inputs = (operands.sizes[letter] for letter in "MNK")
    plan = plan_large_gemm(
        rows, outputs, inputs, is_fp8=operands.is_fp8, is_float_out=operands.is_float_out, tile_tokens=tile_tokens
    )
    num_clusters = max(1, min(plan.num_tiles, device.num_sms // CLUSTER_BLOCKS))
    device.launch(
        Launch(
            program(
                plan,
                outputs,
                inputs,
                is_fp8=operands.is_fp8,
                has_residual=residual is not None,
                is_float_out=operands.is_float_out,
            ),
            "large_gemm",
            grid=(CLUSTER_BLOCKS * num_clusters, 1, 1),
            block=(_NUM_THREADS, 1, 1),
            cluster=(CLUSTER_BLOCKS, 1, 1),
            shared_bytes=plan.shared_bytes,
            arguments=(
                operand_map(operands.weight, _BLOCK_OUTPUTS),
                operand_map(operands.x, plan.tokens // CLUSTER_BLOCKS),
                _out_map(operands.others[3], plan.tokens),
                *operands.others,
                int32("max_rows", rows),
            ),
            overlaps_previous=True,
        )
    )


def program(
    plan: LargePlan, num_outputs: int, num_inputs: int, *, is_fp8: bool, has_residual: bool, is_float_out: bool
) -> Program:
    """The kernel of a plan."""
    return Program.of(
        "large_gemm",
        OUTPUTS=num_outputs,
        INPUTS=num_inputs,
        TOKENS=plan.tokens,
        SEGMENTS=plan.segments,
        STAGES=plan.stages,
        RASTER_TOKENS=_RASTER_TOKENS,
        FP8=int(is_fp8),
        RESIDUAL=int(has_residual),
        FLOAT_OUT=int(is_float_out),
    )


def _out_map(buffer: Buffer, num_rows: int) -> TensorMap:
    """Boxes of 128 bytes of outputs and `num_rows` rows, swizzled in shared memory as the kernel writes them there."""
    assert buffer.tensor is not None
    rows, columns = buffer.tensor.shape
    element_bytes = buffer.dtype.itemsize
    return TensorMap(
        buffer, (columns, rows), (columns * element_bytes,), (128 // element_bytes, num_rows), Swizzle.BYTES_128
    )


def large_gemm_reference(*, tile_tokens: int | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
    """In FP64, unrounded."""
    return skinny_gemm_reference(**inputs)


CASES = (
    Case("NeMo qkv", {"M": 2048, "N": 6144, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo o", {"M": 2048, "N": 5120, "K": 4096}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up", {"M": 2048, "N": 28672, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo down", {"M": 2048, "N": 5120, "K": 14336}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up, 512 rows", {"M": 512, "N": 28672, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo down, 512 rows", {"M": 512, "N": 5120, "K": 14336}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up, 8192 rows", {"M": 8192, "N": 28672, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo down, 8192 rows", {"M": 8192, "N": 5120, "K": 14336}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up, BF16", {"M": 2048, "N": 28672, "K": 5120}, {"bf16": True}, is_emulated=False, is_timed=True),
    Case("NeMo head", {"M": 256, "N": 131072, "K": 5120}, {"bf16": True, "float": True}, is_emulated=False, is_timed=True),
    Case("one interval", {"M": 70, "N": 64, "K": 128}),
    Case("many tiles, two groups", {"M": 530, "N": 320, "K": 128}),
    Case("two segments, ring used again", {"M": 140, "N": 576, "K": 1024}),
    Case("four segments", {"M": 65, "N": 128, "K": 2048}, {"float": True}),
    Case("96 rows a tile", {"M": 192, "N": 256, "K": 256}, {"tile_tokens": 96, "residual": True}),
    Case("128 rows a tile", {"M": 129, "N": 256, "K": 384}, {"tile_tokens": 128, "float": True}),
    Case("160 rows a tile", {"M": 200, "N": 128, "K": 1024}, {"tile_tokens": 160, "residual": True}),
    Case("192 rows a tile", {"M": 392, "N": 64, "K": 640}, {"tile_tokens": 192}),
    Case("BF16", {"M": 130, "N": 320, "K": 320}, {"bf16": True}),
    Case("BF16, two segments", {"M": 66, "N": 128, "K": 512}, {"bf16": True, "residual": True}),
    Case("BF16, 256 rows a tile", {"M": 260, "N": 64, "K": 192}, {"bf16": True, "tile_tokens": 256}),
    Case("BF16 head", {"M": 150, "N": 192, "K": 128}, {"bf16": True, "float": True, "tile_tokens": 128}),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Inputs:
    """As of `skinny_gemm`."""
    return skinny_gemm.make_inputs(case, seed) | {"tile_tokens": case.options.get("tile_tokens")}


_NEMO = ((6144, 5120, True), (5120, 4096, True), (28672, 5120, True), (5120, 14336, True), (131072, 5120, False))


def _nemo_programs() -> tuple[Program, ...]:
    """Of Mistral NeMo's linear layers in FP8 and its head in BF16, for every number of rows up to 8,192."""
    programs = (
        program(
            plan_large_gemm(rows, outputs, inputs, is_fp8=is_fp8, is_float_out=not is_fp8),
            outputs,
            inputs,
            is_fp8=is_fp8,
            has_residual=False,
            is_float_out=not is_fp8,
        )
        for outputs, inputs, is_fp8 in _NEMO
        for rows in range(_GROUP_OUTPUTS, 8193, 32)
    )
    return tuple(dict.fromkeys(programs))


OP = Op(
    name="large_gemm",
    formula="out = (x W^T) * x_scale * weight_scale + residual, any number of rows",
    launch=large_gemm,
    make_inputs=make_inputs,
    reference=large_gemm_reference,
    bounds=skinny_gemm.bounds,
    cost=skinny_gemm.cost,
    cases=CASES,
    programs=_nemo_programs(),
    outputs=("out",),
    rows=("x", "x_scale", "residual", "out"),
    instructions=("HGMMA", "QGMMA", "UTMALDG.2D.MULTICAST", "UTMASTG"),
)
