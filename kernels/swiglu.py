"""SiLU of the gate times up, and FP8 quantisation, row by row."""

from __future__ import annotations

import torch

from kernels.arguments import Access, Buffer
from kernels.contract import check_arguments, check_size
from kernels.e4m3 import code_bounds, row_scales
from kernels.errors import ContractError
from kernels.launch import Device, Launch, Program
from kernels.op import Case, Cost, Inputs, Op

_MAX_FFN = 32_768
_MAX_THREADS = 1024
# exp of the hardware: 2 ulp and the rounding of its argument, gate * log2(e), of at most 128 before the result stops
# to matter: 128 * 2^-24 * ln 2. Division of the hardware: 2 ulp. Addition and product: half an ulp each. In ulp of 2^-23.
_RELATIVE_ERROR = (2 + 128 * 0.5 * 0.694 + 2 + 1) * 2.0**-23


def swiglu(
    device: Device,
    *,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> None:
    """out = gate / (1 + exp(-gate)) * up.

    gate_up [M, 2F] BF16: F gates, then F ups; F a multiple of 128, at most 32,768. out [M, F]: BF16 without scales; e4m3
    with `scale` [M] FP32, which receives max |out| / 448 of each row; or e4m3 with `static_scale` [1] FP32, constant.
    Real value = code x scale. num_rows [1] INT32: rows from there on are left alone.

    ContractError.
    """
    if scale is not None and static_scale is not None:
        raise ContractError("swiglu: scale and static_scale are both given, expected at most one")
    quantisation = 1 if scale is not None else 2 if static_scale is not None else 0
    buffers = (
        Buffer("gate_up", gate_up, Access.READ, "M 2F", torch.bfloat16),
        Buffer("out", out, Access.WRITE, "M F", torch.float8_e4m3fn if quantisation else torch.bfloat16),
        Buffer("scale", scale, Access.WRITE, "M", torch.float32),
        Buffer("static_scale", static_scale, Access.CONSTANT, "1", torch.float32),
        Buffer("num_rows", num_rows, Access.READ, "1", torch.int32),
    )
    sizes = check_arguments("swiglu", device, buffers)
    check_size("swiglu", "F", sizes["F"], multiple_of=128, at_least=128, at_most=_MAX_FFN)
    check_size("swiglu", "2F", sizes["2F"], at_least=2 * sizes["F"], at_most=2 * sizes["F"])
    device.launch(
        Launch(
            program(sizes["F"], quantisation=quantisation),
            "swiglu",
            grid=(sizes["M"], 1, 1),
            block=(_num_threads(sizes["F"]), 1, 1),
            arguments=buffers,
            overlaps_previous=True,
        )
    )


def program(ffn_size: int, *, quantisation: int) -> Program:
    """The kernel for rows of `ffn_size`; `quantisation` 0: BF16, 1: scale per row, 2: given scale."""
    return Program.of("swiglu", FFN=ffn_size, NUM_THREADS=_num_threads(ffn_size), QUANT=quantisation)


def _num_threads(ffn_size: int) -> int:
    """Whole warps; the row's 16-byte pieces divided evenly once a block has too few threads for one each.

    >>> _num_threads(14336), _num_threads(128), _num_threads(8192)
    (896, 32, 1024)
    """
    num_pieces = ffn_size // 8
    pieces_per_thread = -(-num_pieces // _MAX_THREADS)
    return -(-num_pieces // (pieces_per_thread * 32)) * 32


def swiglu_reference(
    *,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    num_rows: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same in FP64; e4m3 outputs unrounded."""
    gate, up = gate_up.double().chunk(2, dim=1)
    y = gate / (1 + torch.exp(-gate)) * up
    expected = {}
    if scale is not None:
        expected["scale"] = row_scales(y)
        y = y / expected["scale"][:, None]
    if static_scale is not None:
        y = (y / static_scale.double()).clamp(-448, 448)
    return expected | {"out": y}


def bounds(inputs: Inputs, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | float]:
    """Half a unit of the output format, and the FP32 roundings before it; below 2^-110 zero may stand for anything."""
    if inputs["scale"] is None and inputs["static_scale"] is None:
        return {"out": expected["out"].abs() * (2.0**-8 + _RELATIVE_ERROR) + 2.0**-110}
    largest: dict[str, torch.Tensor | float] = {}
    if inputs["scale"] is not None:
        largest["scale"] = expected["scale"] * (_RELATIVE_ERROR + 2.0**-24)
    return largest | {"out": code_bounds(expected["out"], 2 * _RELATIVE_ERROR + 4 * 2.0**-24)}


CASES = (
    Case("NeMo decode", {"M": 64, "F": 14336}, {"quant": 1}, is_emulated=False, is_timed=True),
    Case("NeMo prefill", {"M": 8192, "F": 14336}, {"quant": 1}, is_emulated=False, is_timed=True),
    Case("NeMo row", {"M": 3, "F": 14336}, {"quant": 1}),
    Case("NeMo BF16", {"M": 2, "F": 14336}, {"quant": 0}),
    Case("NeMo static", {"M": 2, "F": 14336}, {"quant": 2}),
    Case("half a warp", {"M": 5, "F": 128}, {"quant": 1}),
    Case("a warp and a half", {"M": 2, "F": 384}, {"quant": 0}),
    Case("three pieces per thread", {"M": 2, "F": 16512}, {"quant": 1}),
    Case("widest", {"M": 1, "F": 32768}, {"quant": 2}),
)


def make_inputs(case: Case, seed: int) -> Inputs:
    """Normal rows; with several rows the first is zero, and the second has gates where exp overflows and underflows."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, ffn_size, quantisation = case.sizes["M"], case.sizes["F"], case.options["quant"]
    gate_up = torch.randn(num_rows, 2 * ffn_size, generator=generator)
    if num_rows > 1:
        gate_up[0] = 0
        gate_up[1, :ffn_size] *= 60
    return {
        "gate_up": gate_up.bfloat16(),
        "out": torch.empty(num_rows, ffn_size, dtype=torch.float8_e4m3fn if quantisation else torch.bfloat16),
        "scale": torch.empty(num_rows) if quantisation == 1 else None,
        "static_scale": torch.tensor([0.005]) if quantisation == 2 else None,
        "num_rows": torch.tensor([num_rows], dtype=torch.int32),
    }


def cost(case: Case) -> Cost:
    """Gate and up are read once, the output written once."""
    num_elements = case.sizes["M"] * case.sizes["F"]
    return Cost(flops=5 * num_elements, bytes=num_elements * (4 + (1 if case.options["quant"] else 2)))


OP = Op(
    name="swiglu",
    formula="out = gate / (1 + exp(-gate)) * up",
    launch=swiglu,
    make_inputs=make_inputs,
    reference=swiglu_reference,
    bounds=bounds,
    cost=cost,
    cases=CASES,
    programs=tuple(program(14336, quantisation=quantisation) for quantisation in (0, 1, 2)),
    outputs=("out", "scale"),
    rows=("gate_up", "out", "scale"),
)
