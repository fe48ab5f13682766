"""Some rows of a step one behind the other, with their scales: those that reach the output head."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer
from kernels.contract import check_arguments, check_size
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_NUM_THREADS = 128
_PIECE_BYTES = 16


def gather_rows(
    device: Device,
    *,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> None:
    """out[i] = x[rows[i]], and out_scale[i] = scale[rows[i]].

    x [T, E] and out [M, E]: both BF16, or both e4m3; E a multiple of 128. scale [T] and out_scale [M] FP32, both or none.
    rows [M] INT32, in [0, T). num_rows [1] INT32: rows of out from there on are left alone. ContractError.
    """
    if (scale is None) != (out_scale is None):
        raise ContractError("gather_rows: scale and out_scale must both be given, or none of them")
    dtype = torch.float8_e4m3fn if x.dtype == torch.float8_e4m3fn else torch.bfloat16
    buffers = (
        Buffer("x", x, Access.READ, "T E", dtype),
        Buffer("scale", scale, Access.READ, "T", torch.float32),
        Buffer("rows", rows, Access.READ, "M", torch.int32),
        Buffer("out", out, Access.WRITE, "M E", dtype),
        Buffer("out_scale", out_scale, Access.WRITE, "M", torch.float32),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("gather_rows", device, buffers)
    check_size("gather_rows", "E", sizes["E"], multiple_of=128, at_least=128)
    row_bytes = sizes["E"] * dtype.itemsize
    device.launch(
        Launch(
            program(row_bytes),
            "gather_rows",
            grid=(sizes["M"], -(-row_bytes // (_PIECE_BYTES * _NUM_THREADS)), 1),
            block=(_NUM_THREADS, 1, 1),
            arguments=buffers,
            overlaps_previous=True,
        )
    )


def program(row_bytes: int) -> Program:
    """The kernel for rows of `row_bytes`."""
    return Program.of("gather_rows", ROW_BYTES=row_bytes, NUM_THREADS=_NUM_THREADS)


def gather_rows_reference(
    *,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    out: torch.Tensor,
    out_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same by indexing."""
    expected = {"out": x.float()[rows.long()]}
    return expected if scale is None else expected | {"out_scale": scale[rows.long()]}


CASES = (
    Case("NeMo, 64 of 512", {"T": 512, "M": 64, "E": 5120}, is_emulated=False, is_timed=True),
    Case("NeMo rows", {"T": 4, "M": 3, "E": 5120}),
    Case("NeMo rows, e4m3", {"T": 4, "M": 3, "E": 5120}, {"fp8": True}),
    Case("a block and a part", {"T": 9, "M": 5, "E": 1152}),
    Case("fewest pieces", {"T": 1, "M": 2, "E": 128}, {"fp8": True}),
    Case("more rows than there are", {"T": 3, "M": 70, "E": 256}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Rows anywhere, some of them more than once."""
    generator = torch.Generator().manual_seed(seed)
    num_sources, num_rows, width = (case.sizes[letter] for letter in "TME")
    is_fp8 = case.options.get("fp8", False)
    dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    return {
        "x": torch.randn(num_sources, width, generator=generator).to(dtype),
        "scale": torch.rand(num_sources, generator=generator) if is_fp8 else None,
        "rows": torch.randint(num_sources, (num_rows,), generator=generator, dtype=torch.int32),
        "out": torch.empty(num_rows, width, dtype=dtype),
        "out_scale": torch.empty(num_rows) if is_fp8 else None,
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Each row is read and written once."""
    per_row = 2 * case.sizes["E"] * (1 if case.options.get("fp8") else 2) + 4
    return Cost(flops=0, bytes=case.sizes["M"] * per_row)


OP = Op(
    name="gather_rows",
    formula="out[i] = x[rows[i]]",
    launch=gather_rows,
    make_inputs=make_inputs,
    reference=gather_rows_reference,
    bounds=lambda inputs, expected: dict.fromkeys(expected, 0.0),
    cost=cost,
    cases=CASES,
    programs=(program(5120), program(10_240)),
    outputs=("out", "out_scale"),
    rows=("rows", "out", "out_scale"),
)
