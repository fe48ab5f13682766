"""Residual add, RMSNorm and FP8 quantisation, row by row."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer, float32
from kernels.contract import check_arguments, check_size
from kernels.e4m3 import code_bounds, row_scales
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_MAX_HIDDEN = 16_384
_MAX_THREADS = 1024
# The sum of squares: 16 squares and additions in a thread at most (2 pieces of 8), 5 additions in its warp, 31 warps; then a
# division, an addition, a root (which halves the error so far), a division, two products. Each rounds by at most 2^-24.
_RELATIVE_ERROR = ((1 + 16 + 5 + 31 + 2) / 2 + 4) * 2.0**-24


def rmsnorm(
    device: Device,
    *,
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
    eps: float,
) -> None:
    """h = residual + x; out = h / sqrt(mean(h^2) + eps) * weight.

    x [M, E] BF16, or None: then h = residual. residual [M, E] BF16, updated to h (rounded, and the norm is that of the
    rounded h) unless x is None. weight [E] BF16, constant. E a multiple of 128, at most 16,384.
    out [M, E]: BF16 without scales; e4m3 with `scale` [M] FP32, which receives max |out| / 448 of each row; or e4m3 with
    `static_scale` [1] FP32, constant. Real value = code x scale. num_rows [1] INT32: rows from there on are left alone.

    ContractError.
    """
    if scale is not None and static_scale is not None:
        raise ContractError("rmsnorm: scale and static_scale are both given, expected at most one")
    quantisation = 1 if scale is not None else 2 if static_scale is not None else 0
    buffers = (
        Buffer("x", x, Access.READ, "M E", torch.bfloat16),
        Buffer("residual", residual, Access.READ if x is None else Access.UPDATE, "M E", torch.bfloat16),
        Buffer("weight", weight, Access.CONSTANT, "E", torch.bfloat16),
        Buffer("out", out, Access.WRITE, "M E", torch.float8_e4m3fn if quantisation else torch.bfloat16),
        Buffer("scale", scale, Access.WRITE, "M", torch.float32),
        Buffer("static_scale", static_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("rmsnorm", device, buffers)
    check_size("rmsnorm", "E", sizes["E"], multiple_of=128, at_least=128, at_most=_MAX_HIDDEN)
    its_program = program(sizes["E"], has_addend=x is not None, quantisation=quantisation)
    device.launch(
        Launch(
            its_program,
            "rmsnorm",
            grid=(sizes["M"], 1, 1),
            block=(_num_threads(sizes["E"]), 1, 1),
            arguments=(*buffers, float32("eps", eps)),
            overlaps_previous=True,
        )
    )


def program(hidden_size: int, *, has_addend: bool, quantisation: int) -> Program:
    """The kernel for rows of `hidden_size`; `quantisation` 0: BF16, 1: scale per row, 2: given scale."""
    return Program.of(
        "rmsnorm", HIDDEN=hidden_size, NUM_THREADS=_num_threads(hidden_size), ADD=int(has_addend), QUANT=quantisation
    )


def _num_threads(hidden_size: int) -> int:
    """Whole warps, one 16-byte piece per thread while a block has so many.

    >>> _num_threads(5120), _num_threads(128), _num_threads(16384)
    (640, 32, 1024)
    """
    return min(_MAX_THREADS, -(-hidden_size // (8 * 32)) * 32)


def rmsnorm_reference(
    *,
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
    eps: float,
) -> dict[str, torch.Tensor]:
    """The same in FP64 from the rounded h; e4m3 outputs unrounded."""
    expected = {}
    h = residual.float()
    if x is not None:
        h = (h + x.float()).bfloat16().float()
        expected["residual"] = h
    h = h.double()
    y = h / torch.sqrt(h.square().mean(dim=1, keepdim=True) + torch.tensor(eps, dtype=torch.float32).double())
    y *= weight.double()
    if scale is not None:
        expected["scale"] = row_scales(y)
        y /= expected["scale"][:, None]
    if static_scale is not None:
        y = (y / static_scale.double()).clamp(-448, 448)
    return expected | {"out": y}


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """Half a unit of the output format, and the FP32 roundings before it."""
    largest: dict[str, torch.Tensor | float] = {}
    if "residual" in expected:
        largest["residual"] = 0.0
    if inputs["scale"] is None and inputs["static_scale"] is None:
        return largest | {"out": expected["out"].abs() * (2.0**-8 + _RELATIVE_ERROR) + 2.0**-133}
    if inputs["scale"] is not None:
        largest["scale"] = expected["scale"] * (_RELATIVE_ERROR + 2.0**-24)
    # The value, and with a scale per row also the scale, the inverse of the scale and the product.
    return largest | {"out": code_bounds(expected["out"], 2 * _RELATIVE_ERROR + 4 * 2.0**-24)}


CASES = (
    Case("NeMo decode", {"M": 64, "E": 5120}, {"add": True, "quant": 1}, is_emulated=False, is_timed=True),
    Case("NeMo prefill", {"M": 8192, "E": 5120}, {"add": True, "quant": 1}, is_emulated=False, is_timed=True),
    Case("NeMo rows", {"M": 4, "E": 5120}, {"add": True, "quant": 1}),
    Case("NeMo BF16", {"M": 3, "E": 5120}, {"add": True, "quant": 0}),
    Case("NeMo static", {"M": 3, "E": 5120}, {"add": True, "quant": 2}),
    Case("no addend", {"M": 3, "E": 5120}, {"add": False, "quant": 1}),
    Case("half a warp", {"M": 2, "E": 128}, {"add": True, "quant": 1}),
    Case("a warp and a half", {"M": 5, "E": 384}, {"add": False, "quant": 0}),
    Case("two pieces per thread", {"M": 2, "E": 8320}, {"add": True, "quant": 1}),
    Case("widest", {"M": 1, "E": 16384}, {"add": True, "quant": 2}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Normal rows; with several rows the first is zero and the second large, so that floor and clamp are used."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, hidden_size, quantisation = case.sizes["M"], case.sizes["E"], case.options["quant"]
    x = torch.randn(num_rows, hidden_size, generator=generator).bfloat16()
    residual = (2 * torch.randn(num_rows, hidden_size, generator=generator)).bfloat16()
    if num_rows > 1:
        x[0], residual[0] = 0, 0
        residual[1] *= 1e4
    return {
        "x": x if case.options["add"] else None,
        "residual": residual,
        "weight": (1 + 0.1 * torch.randn(hidden_size, generator=generator)).bfloat16(),
        "out": torch.empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn if quantisation else torch.bfloat16),
        "scale": torch.empty(num_rows) if quantisation == 1 else None,
        "static_scale": torch.tensor([0.005]) if quantisation == 2 else None,
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
        "eps": 1e-5,
    }


def cost(case: Case) -> Cost:
    """Row and addend are read once, the sum and the output written once."""
    num_elements = case.sizes["M"] * case.sizes["E"]
    moved = (2 + 4 * case.options["add"]) + (1 if case.options["quant"] else 2)
    return Cost(flops=5 * num_elements, bytes=num_elements * moved + 2 * case.sizes["E"])


OP = Op(
    name="rmsnorm",
    formula="h = residual + x; out = h / sqrt(mean(h^2) + eps) * weight",
    launch=rmsnorm,
    make_inputs=make_inputs,
    reference=rmsnorm_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=tuple(program(5120, has_addend=add, quantisation=quant) for add in (False, True) for quant in (0, 1, 2)),
    outputs=("out", "scale"),
    updated=("residual",),
    rows=("x", "residual", "out", "scale"),
)
