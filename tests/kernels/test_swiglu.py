"""SwiGLU: agreement with the PyTorch runner's definition, gates where exp overflows, rows that are left alone."""

from __future__ import annotations

import pytest
import torch

from kernels.check import check_case
from kernels.errors import ContractError
from kernels.op import Case
from kernels.swiglu import CASES, OP, make_inputs, swiglu
from tests.emulator.build import Mutant
from tests.emulator.device import CHECKED, PLAIN, Conditions, EmulatedDevice

MUTANTS = (
    Mutant.of("dropped dependency wait", "swiglu.cu", "  hw::griddep_wait();\n"),
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
    Mutant.of("up read from the gates", "swiglu.cu", "row * 2 * FFN + FFN + piece * 8", "row * 2 * FFN + piece * 8"),
    Mutant.of(
        "no floor under the scale",
        "swiglu.cu",
        "fmaxf(block_max<NUM_WARPS>(amax, maxima), AMAX_FLOOR)",
        "block_max<NUM_WARPS>(amax, maxima)",
    ),
)


@pytest.mark.parametrize("conditions", [*CHECKED[:2], PLAIN[2]], ids=str)
@pytest.mark.parametrize("case", [case for case in OP.cases if case.is_emulated], ids=lambda case: case.name)
def test_every_case(case: Case, conditions: Conditions) -> None:
    check_case(OP, case, EmulatedDevice(conditions))


def test_the_product_is_the_pytorch_runners() -> None:
    inputs = make_inputs(Case("product", {"M": 4, "F": 640}, {"quant": 0}), seed=3)
    gate, up = inputs["gate_up"].float().chunk(2, dim=1)
    swiglu(EmulatedDevice(PLAIN[0]), **inputs)
    expected = (gate / (1.0 + torch.exp(-gate))).mul_(up)
    torch.testing.assert_close(inputs["out"].float(), expected, rtol=2.0**-8, atol=1e-30)


def test_gates_at_the_ends_of_exp() -> None:
    inputs = make_inputs(Case("ends", {"M": 1, "F": 128}, {"quant": 0}), seed=1)
    gates = torch.tensor([-3.0e38, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 3.0e38])
    inputs["gate_up"][0, :8] = gates
    inputs["gate_up"][0, 128:136] = 1.0
    swiglu(EmulatedDevice(CHECKED[0]), **inputs)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 88.0, 200.0, 3.0e38]).bfloat16()
    torch.testing.assert_close(inputs["out"][0, :8], expected, rtol=0, atol=1e-33)


def test_rows_from_num_rows_on_are_left_alone() -> None:
    inputs = make_inputs(Case("part", {"M": 5, "F": 256}, {"quant": 1}), seed=1)
    inputs["scale"].fill_(7.0)
    inputs["num_rows"][0] = 3
    swiglu(EmulatedDevice(CHECKED[0]), **inputs)
    assert (inputs["scale"] == 7.0).tolist() == [False, False, False, True, True]


def test_gates_and_ups_of_different_number_are_refused() -> None:
    inputs = make_inputs(Case("odd", {"M": 1, "F": 256}, {"quant": 0}), seed=1)
    inputs["gate_up"] = inputs["gate_up"][:, :384].contiguous()
    with pytest.raises(ContractError, match="swiglu: 2F is 384, expected 512 to 512"):
        swiglu(EmulatedDevice(), **inputs)


def test_the_cases_reach_every_branch() -> None:
    emulated = [case for case in CASES if case.is_emulated]
    assert {case.options["quant"] for case in emulated} == {0, 1, 2}
    assert {-(-case.sizes["F"] // 8192) for case in emulated} >= {1, 2, 3, 4}
