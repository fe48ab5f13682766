"""Linear layers for few rows (a decode step), FP8 or BF16: y = x W^T at the speed at which the weights can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.arguments import Access, Buffer, Swizzle, TensorMap, int32
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.op import FP8_FLOP_PER_US, HALF_FLOP_PER_US, Case, Cost, Inputs, Op

MAX_ROWS = 128
_TILE_OUTPUTS = 64
_STAGE_BYTES_OF_K = 128
_MIN_STAGES, _MAX_STAGES = 2, 8
_TOKEN_WIDTHS = (8, 16, 32, 64, 128)
_SEGMENT_COUNTS = (1, 2, 4, 8)
_SUM_STRIDE_BYTES = 4 * (_TILE_OUTPUTS + 4)
_NUM_THREADS = 160
# The plan must not depend on the machine, or results would: H100 and H200 (SXM) have this many SMs, each with this much.
_NUM_SMS = 132
_SM_SHARED_BYTES = 227 * 1024
# A segment of fewer intervals is over before the copies are under way.
_MIN_INTERVALS = 4
# Nearly one block for every SM.
_ENOUGH_BLOCKS = 120
# Blocks that share an SM; more of them would have rings too short to be worth it.
_MAX_BLOCKS_PER_SM = 4
# Of a block, besides what it asks for: its barriers, a kilobyte of the system's, the alignment to a kilobyte.
_BLOCK_OVERHEAD_BYTES = 2048


@dataclass(frozen=True)
class SkinnyPlan:
    """How an [N, K] matrix is cut for `tokens` rows at most; `segments` depend on N and K alone."""

    tokens: int
    segments: int
    stages: int
    num_tiles: int
    shared_bytes: int
    blocks_per_sm: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the launch."""
        return self.num_tiles * self.segments

    @property
    def num_running(self) -> int:
        """Blocks that run at once; almost always all of them."""
        return min(self.num_blocks, self.blocks_per_sm * _NUM_SMS)

    @property
    def weight_bytes_in_flight(self) -> int:
        """What an SM, on average, has asked for when all running blocks have just started."""
        return self.num_running * self.stages * _TILE_OUTPUTS * _STAGE_BYTES_OF_K // _NUM_SMS

    def __str__(self) -> str:
        return (
            f"{self.num_tiles} tiles x {self.segments} segments = {self.num_blocks} blocks for up to {self.tokens} rows, "
            f"{self.num_running} at once on {_NUM_SMS} SMs, "
            f"{self.stages} stages, {self.weight_bytes_in_flight // 1024} KB of weights in flight a SM"
        )


def plan_skinny_gemm(num_rows: int, num_outputs: int, num_inputs: int, *, is_fp8: bool) -> SkinnyPlan:
    """The plan for x [num_rows, num_inputs] and a weight [num_outputs, num_inputs]; ContractError if there is none.

    >>> print(plan_skinny_gemm(1, 28672, 5120, is_fp8=True))
    448 tiles x 1 segments = 448 blocks for up to 8 rows, 448 at once on 132 SMs, 6 stages, 162 KB of weights in flight a SM
    """
    stage_k = _STAGE_BYTES_OF_K // (1 if is_fp8 else 2)
    check_size("skinny_gemm", "M", num_rows, at_least=1, at_most=MAX_ROWS)
    check_size("skinny_gemm", "N", num_outputs, multiple_of=_TILE_OUTPUTS, at_least=_TILE_OUTPUTS)
    check_size("skinny_gemm", "K", num_inputs, multiple_of=stage_k, at_least=stage_k)
    tokens = next(width for width in _TOKEN_WIDTHS if width >= num_rows)
    num_tiles, num_intervals = num_outputs // _TILE_OUTPUTS, num_inputs // stage_k
    segments = num_segments(num_outputs, num_intervals)
    sharing = min(math.ceil(num_tiles * segments / _NUM_SMS), _MAX_BLOCKS_PER_SM)
    stage_bytes = (_TILE_OUTPUTS + tokens) * _STAGE_BYTES_OF_K
    room = (_SM_SHARED_BYTES // sharing - _BLOCK_OVERHEAD_BYTES) // stage_bytes
    stages = min(max(room, _MIN_STAGES), _MAX_STAGES, num_intervals // segments)
    shared_bytes = max(stages * stage_bytes, tokens * _SUM_STRIDE_BYTES)
    blocks_per_sm = min(_SM_SHARED_BYTES // (shared_bytes + _BLOCK_OVERHEAD_BYTES), 2048 // _NUM_THREADS)
    return SkinnyPlan(tokens, segments, stages, num_tiles, shared_bytes, blocks_per_sm)


def num_segments(num_outputs: int, num_intervals: int) -> int:
    """The fewest segments of K that give (almost) every SM a block. large_gemm adds up in the same segments.

    More would only help if blocks waited for an SM. They do not: all of them run at once and share one memory, which serves
    each in proportion to what it has asked for, so that a SM with two blocks is twice as fast as one with one.
    """
    num_tiles = num_outputs // _TILE_OUTPUTS
    possible = [
        count
        for count in _SEGMENT_COUNTS
        if num_intervals % count == 0 and (count == 1 or num_intervals // count >= _MIN_INTERVALS)
    ]
    return next((count for count in possible if num_tiles * count >= _ENOUGH_BLOCKS), possible[-1])


def skinny_gemm(
    device: Device,
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: torch.Tensor,
) -> None:
    """out = (x W^T) * x_scale * weight_scale + residual.

    x [M, K], M at most 128, and weight [N, K], constant: both e4m3 with x_scale [M] FP32 and weight_scale [N] FP32, constant;
    or both BF16 without scales. N a multiple of 64; K of 128 (FP8) or 64 (BF16). residual [M, N] BF16 or None. out [M, N]
    BF16 or FP32, another tensor than residual. num_rows [1] INT32: rows of out from there on are left alone.

    ContractError.
    """
    operands = check_linear(
        "skinny_gemm",
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
    plan = plan_skinny_gemm(rows, outputs, inputs, is_fp8=operands.is_fp8)
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
            "skinny_gemm",
            grid=(plan.segments, plan.num_tiles, 1),
            block=(_NUM_THREADS, 1, 1),
            cluster=(plan.segments, 1, 1),
            shared_bytes=plan.shared_bytes,
            arguments=(
                operand_map(operands.weight, _TILE_OUTPUTS),
                operand_map(operands.x, plan.tokens),
                *operands.others,
                int32("max_rows", rows),
            ),
            overlaps_previous=True,
        )
    )


@dataclass(frozen=True)
class LinearOperands:
    """The buffers of a linear layer, checked; `others`: weight_scale, x_scale, residual, out, num_rows."""

    weight: Buffer
    x: Buffer
    others: tuple[Buffer, ...]
    sizes: dict[str, int]
    is_fp8: bool
    is_float_out: bool


def check_linear(
    op: str,
    device: Device,
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: torch.Tensor,
) -> LinearOperands:
    """The contract of `skinny_gemm`, but for the bounds of the sizes. ContractError in the name of `op`."""
    is_fp8 = weight.dtype == torch.float8_e4m3fn
    if is_fp8 != (x_scale is not None) or is_fp8 != (weight_scale is not None):
        raise ContractError(f"{op}: x_scale and weight_scale must both be given for FP8, and neither for BF16")
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    out_dtype = torch.float32 if out.dtype == torch.float32 else torch.bfloat16
    weight_buffer = Buffer("weight", weight, Access.CONSTANT, "N K", dtype)
    x_buffer = Buffer("x", x, Access.READ, "M K", dtype)
    others = (
        Buffer("weight_scale", weight_scale, Access.CONSTANT, "N", torch.float32),
        Buffer("x_scale", x_scale, Access.READ, "M", torch.float32),
        Buffer("residual", residual, Access.READ, "M N", torch.bfloat16),
        Buffer("out", out, Access.WRITE, "M N", out_dtype),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments(op, device, (weight_buffer, x_buffer, *others))
    return LinearOperands(weight_buffer, x_buffer, others, sizes, is_fp8, out_dtype == torch.float32)


def program(
    plan: SkinnyPlan, num_outputs: int, num_inputs: int, *, is_fp8: bool, has_residual: bool, is_float_out: bool
) -> Program:
    """The kernel of a plan."""
    return Program.of(
        "skinny_gemm",
        OUTPUTS=num_outputs,
        INPUTS=num_inputs,
        TOKENS=plan.tokens,
        SEGMENTS=plan.segments,
        STAGES=plan.stages,
        FP8=int(is_fp8),
        RESIDUAL=int(has_residual),
        FLOAT_OUT=int(is_float_out),
    )


def operand_map(buffer: Buffer, num_rows: int) -> TensorMap:
    """Boxes of `num_rows` rows and 128 bytes of K, swizzled as wgmma reads them; rows beyond the tensor are zero."""
    assert buffer.tensor is not None
    rows, columns = buffer.tensor.shape
    element_bytes = buffer.dtype.itemsize
    box = (_STAGE_BYTES_OF_K // element_bytes, num_rows)
    return TensorMap(buffer, (columns, rows), (columns * element_bytes,), box, Swizzle.BYTES_128)


def skinny_gemm_reference(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """In FP64, unrounded."""
    y = x.float().double() @ weight.float().double().T
    if x_scale is not None and weight_scale is not None:
        y = y * x_scale.double()[:, None] * weight_scale.double()
    return {"out": y if residual is None else y + residual.double()}


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """What the sums may lose, in the worst case, and half a unit of the output.

    BF16 products are added in FP32. FP8 ones are added in the tensor core, which keeps 14 bits below the largest addend of
    an instruction (32 products, and the sum so far): each of the 4 instructions of an interval loses 2^-13 of it at most.
    Source: DeepSeek-V3 technical report, section 3.5.2; to be verified on hardware.
    """
    x, weight = inputs["x"].float().double().abs(), inputs["weight"].float().double().abs()
    magnitudes = x @ weight.T
    is_fp8 = inputs["x_scale"] is not None
    if is_fp8:
        magnitudes = magnitudes * inputs["x_scale"].double()[:, None] * inputs["weight_scale"].double()
    relative = 4 * 2.0**-13 if is_fp8 else x.shape[1] * 2.0**-24
    error = magnitudes * (relative + x.shape[1] * 2.0**-24) + expected["out"].abs() * 4 * 2.0**-24
    unit = 2.0**-24 if inputs["out"].dtype == torch.float32 else 2.0**-8
    return {"out": error + (expected["out"].abs() + error) * unit + 2.0**-133}


CASES = (
    Case("NeMo qkv", {"M": 64, "N": 6144, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo o", {"M": 64, "N": 5120, "K": 4096}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up", {"M": 64, "N": 28672, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo down", {"M": 64, "N": 5120, "K": 14336}, is_emulated=False, is_timed=True),
    Case("NeMo gate_up, one row", {"M": 1, "N": 28672, "K": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo down, one row", {"M": 1, "N": 5120, "K": 14336}, is_emulated=False, is_timed=True),
    Case("NeMo head", {"M": 64, "N": 131072, "K": 5120}, {"bf16": True, "float": True}, is_emulated=False, is_timed=True),
    Case("o, two tiles", {"M": 3, "N": 128, "K": 4096}),
    Case("ring used again", {"M": 9, "N": 64, "K": 10240}),
    Case("one interval", {"M": 8, "N": 64, "K": 128}),
    Case("one segment", {"M": 5, "N": 64, "K": 896}, {"float": True}),
    Case("a residual", {"M": 17, "N": 128, "K": 1024}, {"residual": True}),
    Case("64 rows", {"M": 64, "N": 64, "K": 1024}),
    Case("128 rows less one", {"M": 127, "N": 64, "K": 512}, {"residual": True}),
    Case("BF16", {"M": 2, "N": 128, "K": 1024}, {"bf16": True}),
    Case("BF16 head", {"M": 20, "N": 192, "K": 256}, {"bf16": True, "float": True}),
    Case("BF16, ring used again", {"M": 33, "N": 64, "K": 5120}, {"bf16": True, "residual": True}),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Inputs:
    """Normal values; scales between a half and two, times what brings results near one."""
    generator = torch.Generator().manual_seed(seed)
    rows, outputs, inputs = (case.sizes[letter] for letter in "MNK")
    is_fp8 = not case.options.get("bf16", False)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16

    def scales(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator).mul_(1.5).add_(0.5).mul_(inputs**-0.25)

    return {
        "x": torch.randn(rows, inputs, generator=generator).to(dtype),
        "weight": torch.randn(outputs, inputs, generator=generator).to(dtype),
        "x_scale": scales(rows) if is_fp8 else None,
        "weight_scale": scales(outputs) if is_fp8 else None,
        "residual": torch.randn(rows, outputs, generator=generator).bfloat16()
        if case.options.get("residual")
        else None,
        "out": torch.empty(rows, outputs, dtype=torch.float32 if case.options.get("float") else torch.bfloat16),
        "num_rows": torch.tensor([rows], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """The weights once, rows in and out once."""
    rows, outputs, inputs = (case.sizes[letter] for letter in "MNK")
    element_bytes = 2 if case.options.get("bf16") else 1
    out_bytes = (4 if case.options.get("float") else 2) + (2 if case.options.get("residual") else 0)
    moved = (rows + outputs) * inputs * element_bytes + rows * outputs * out_bytes
    rate = HALF_FLOP_PER_US if case.options.get("bf16") else FP8_FLOP_PER_US
    return Cost(flops=2 * rows * outputs * inputs, bytes=moved, flop_per_us=rate)


def _nemo_programs() -> tuple[Program, ...]:
    """Of a decode step of Mistral NeMo: the linear layers in FP8, and the head in BF16, for every width."""
    shapes = [(6144, 5120, True), (5120, 4096, True), (28672, 5120, True), (5120, 14336, True), (131072, 5120, False)]
    return tuple(
        program(
            plan_skinny_gemm(width, outputs, inputs, is_fp8=is_fp8),
            outputs,
            inputs,
            is_fp8=is_fp8,
            has_residual=False,
            is_float_out=not is_fp8,
        )
        for outputs, inputs, is_fp8 in shapes
        for width in _TOKEN_WIDTHS
    )


OP = Op(
    name="skinny_gemm",
    formula="out = (x W^T) * x_scale * weight_scale + residual, at most 128 rows",
    launch=skinny_gemm,
    make_inputs=make_inputs,
    reference=skinny_gemm_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=_nemo_programs(),
    outputs=("out",),
    rows=("x", "x_scale", "residual", "out"),
    instructions=("HGMMA", "QGMMA", "UTMALDG"),
)
