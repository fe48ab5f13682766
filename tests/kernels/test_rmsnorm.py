"""RMSNorm: agreement with the PyTorch runner's definition, rows that are left alone, rows that are no numbers."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.op import Case
from kernels.rmsnorm import CASES, OP, make_inputs, rmsnorm
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "rmsnorm.cu", "  hw::griddep_wait();\n"),
    Mutant(
        "dropped barrier before the warps' sums are added",
        "numeric.cuh",
        (
            (
                "partials[threadIdx.x >> 5] = x;\n  __syncthreads();\n  float sum",
                "partials[threadIdx.x >> 5] = x;\n  float sum",
            ),
        ),
    ),
    Mutant(
        "dropped barrier before the warps' maxima are compared",
        "numeric.cuh",
        (
            (
                "partials[threadIdx.x >> 5] = x;\n  __syncthreads();\n  float largest",
                "partials[threadIdx.x >> 5] = x;\n  float largest",
            ),
        ),
    ),
    Mutant.of("maxima in the place of sums that others still read", "rmsnorm.cu", "(amax, maxima)", "(amax, sums)"),
    Mutant.of("residual read instead of its sum", "rmsnorm.cu", "      unpack(rounded, h[j]);\n"),
    Mutant.of("tail read beyond the row", "rmsnorm.cu", "    if (piece < PIECES) weights", "    weights"),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_the_norm_is_the_pytorch_runners_of_the_rounded_sum() -> None:
    inputs = make_inputs(Case("norm", {"M": 4, "E": 640}, {"add": True, "quant": 0}), seed=3)
    h = (inputs["residual"].float() + inputs["x"].float()).bfloat16().float()
    rmsnorm(EmulatedDevice(PLAIN[0]), **inputs)
    scaled = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-5)
    expected = scaled.mul_(inputs["weight"].float())
    assert torch.equal(inputs["residual"].float(), h)
    torch.testing.assert_close(inputs["out"].float(), expected, rtol=2.0**-8, atol=0)


def test_rows_from_num_rows_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"M": 5, "E": 256}, {"add": True, "quant": 1}), seed=1)
    residual = inputs["residual"].clone()
    inputs["scale"].fill_(7.0)
    inputs["num_rows"][0] = 3
    rmsnorm(EmulatedDevice(CHECKED[0]), **inputs)
    assert torch.equal(inputs["residual"][3:], residual[3:])
    assert not torch.equal(inputs["residual"][:3], residual[:3])
    assert (inputs["scale"] == 7.0).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_spoils_no_other(value: float) -> None:
    inputs = make_inputs(Case("bad row", {"M": 3, "E": 256}, {"add": True, "quant": 1}), seed=1)
    expected = OP.reference(**inputs)
    inputs["x"][1, 77] = value
    rmsnorm(EmulatedDevice(CHECKED[0]), **inputs)
    assert inputs["out"].float()[1, 77].isnan()
    torch.testing.assert_close(inputs["scale"][[0, 2]].double(), expected["scale"][[0, 2]], rtol=1e-5, atol=0)
    assert not inputs["out"].float()[[0, 2]].isnan().any()


def test_two_kinds_of_scale_are_refused() -> None:
    inputs = make_inputs(Case("both", {"M": 1, "E": 128}, {"add": True, "quant": 1}), seed=1)
    with pytest.raises(ContractError, match="rmsnorm: scale and static_scale are both given"):
        rmsnorm(EmulatedDevice(), **inputs | {"static_scale": torch.ones(1)})


@pytest.mark.parametrize("hidden_size", [64, 16512])
def test_a_hidden_size_out_of_bounds_is_refused(hidden_size: int) -> None:
    inputs = make_inputs(Case("odd", {"M": 1, "E": hidden_size}, {"add": True, "quant": 1}), seed=1)
    with pytest.raises(ContractError, match=f"rmsnorm: E is {hidden_size}, expected a multiple of 128, 128 to 16384"):
        rmsnorm(EmulatedDevice(), **inputs)


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    assert {(case.options["add"], case.options["quant"]) for case in emulated} >= {
        (True, 0), (True, 1), (True, 2), (False, 0), (False, 1),
    }  # fmt: skip
    assert {-(-case.sizes["E"] // 8192) for case in emulated} >= {1, 2}
